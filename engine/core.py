"""The engine's main process: scheduler, step loop, metrics port, and the ranks below it.

`python -m engine.core <run_dir>`, started by the supervisor. Leaves with 0 when told to stop, 1 when a rank
or the engine itself failed, 2 when a setting is wrong. If the supervisor is gone it also cleans up.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import signal
import sys
from collections.abc import Sequence

import uvloop
import zmq

from engine.channels import RunDirectory
from engine.config import read_config
from engine.debug_pages import debug_pages
from engine.errors import ConfigError, EngineError
from engine.gateway import ApiGateway
from engine.gauges import watch
from engine.loop import StepLoop
from engine.media_files import MediaFiles
from engine.metrics import Metrics
from engine.metrics_server import MetricsServer
from engine.model_config import read_model_config
from engine.process import begin_child
from engine.scheduler import Scheduler
from engine.worker_group import WORKER_COMMAND, WorkerGroup

_IDLE_COLLECTIONS = 50_000  # allocations between collections of young objects; the hot path makes no cycles

log = logging.getLogger(__name__)


class Core:
    """Everything of the engine process that has to be closed again."""

    def __init__(self, run: RunDirectory, worker_command: Sequence[str]) -> None:
        self._config = read_config(run.config)
        self._model = read_model_config(self._config.model, self._config.config_overrides)
        self._context = zmq.Context()
        self._metrics = Metrics()
        self._metrics_server = MetricsServer(self._metrics, self._config.host, self._config.metrics_port)
        self._gateway = ApiGateway(self._context, run)
        self._group = WorkerGroup(self._context, run, self._config, self._on_rank_failure, worker_command)
        self._steps: StepLoop | None = None
        patch_bytes = self._model.vision.patch_features if self._model.vision else 0
        self._media = MediaFiles(run.media, patch_bytes)
        self._starting: asyncio.Task[int] | None = None
        self._is_stopping = False

    async def run(self) -> int:
        """Serve until told to stop; returns the exit code."""
        try:
            self._gateway.open()
            num_blocks = await self._start_ranks()
            if num_blocks:
                await self._serve(num_blocks)
            self._gateway.announce("stopping")
            return 0
        except ConfigError as error:
            log.error("%s", error)
            self._gateway.announce("failed", str(error))
            return 2
        except EngineError as error:
            self._gateway.announce("failed", str(error))
            return 1
        except Exception as error:
            log.exception("the engine failed")
            self._gateway.announce("failed", f"{type(error).__name__} in the engine")
            return 1
        finally:
            await self._close()

    def stop(self) -> None:
        """End `run` soon; open requests end with an error."""
        self._is_stopping = True
        self._gateway.announce("stopping")
        if self._steps:
            self._steps.stop()
        elif self._starting:
            self._starting.cancel()

    async def _start_ranks(self) -> int:
        """The number of KV blocks; 0 when we were told to stop meanwhile."""
        self._starting = asyncio.create_task(self._group.start(self._on_progress))
        try:
            return await self._starting
        except asyncio.CancelledError:
            if self._is_stopping:
                return 0
            raise

    async def _serve(self, num_blocks: int) -> None:
        config = self._config
        scheduler = Scheduler(
            config,
            num_blocks,
            self._model.eos_token_ids,
            self._model.vocab_size,
            self._group.num_host_blocks,
        )
        self._steps = StepLoop(
            scheduler, self._group, self._gateway, self._metrics, self._media, overlap=config.overlap
        )
        self._metrics_server.show(debug_pages(scheduler))
        watch(self._metrics, scheduler, config, num_blocks)
        self._gateway.serve(self._steps)
        self._gateway.announce("ready", "", num_blocks, config.block_size)
        quieten_garbage_collector()
        if not self._is_stopping:
            await self._steps.run()

    def _on_progress(self, detail: str) -> None:
        self._gateway.announce("starting", detail)

    def _on_rank_failure(self) -> None:
        if self._steps:
            self._steps.wake()

    async def _close(self) -> None:
        """The api hears of the end first; then the ranks go."""
        self._gateway.close()
        await self._group.stop()
        self._metrics_server.close()
        await asyncio.get_running_loop().run_in_executor(None, self._context.term)


def quieten_garbage_collector() -> None:
    """What exists now stays for good; collections would only look at it again in the middle of a step."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_IDLE_COLLECTIONS, 20, 100)


async def serve(run: RunDirectory, worker_command: Sequence[str]) -> int:
    """Run a core until it ends by itself or by SIGTERM."""
    supervisor = os.getppid()
    core = Core(run, worker_command)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, core.stop)
    try:
        return await core.run()
    finally:
        if os.getppid() != supervisor:
            log.warning("the supervisor is gone; removing %s", run.root)
            _remove(run)


def _remove(run: RunDirectory) -> None:
    """An api process that dies at the same moment may still be writing there."""
    for _ in range(20):
        shutil.rmtree(run.root, ignore_errors=True)
        if not run.root.exists():
            return


def main(run_directory: str, worker_command: Sequence[str] = WORKER_COMMAND) -> int:
    """The process; returns its exit code."""
    begin_child("engine", signal.SIGTERM)
    try:
        return uvloop.run(serve(RunDirectory(run_directory), worker_command))
    except ConfigError as error:
        log.error("%s", error)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

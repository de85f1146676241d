"""The ranks as one thing that runs steps: started together, given each plan at once, dead together.

Starts `python -m workers <run_dir> <rank>` for every rank, shakes hands (channels.py has the order), sends
each plan encoded once to every rank, and watches: a rank that ends, says RankFailed or shows no sign of life
makes the whole group fail, with one sentence that names it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq

from engine.channels import Codec, RunDirectory, open_socket
from engine.config import ServerConfig
from engine.errors import ConfigError, EngineError
from engine.forked_ranks import fork_ranks
from engine.messages import (
    FromWorker,
    RankFailed,
    RankHello,
    RankLoaded,
    RankReady,
    StartServing,
    StepPlan,
    StepResult,
    StopServing,
    ToWorker,
)
from engine.progress import LoadingProgress, count_ranks, seconds_since
from engine.rank_process import RankProcess
from engine.readers import SocketReader
from engine.status_page import Phase, StatusPage

WORKER_COMMAND = (sys.executable, "-m", "workers")

_WATCH_INTERVAL = 0.25  # seconds between looks at the status page
_STARVED = 0.5  # seconds by which a look may be late before it is not trusted
_LOADING_SILENCE = 60.0  # seconds a rank may be silent before it serves
_START_SECONDS = 120.0  # until a rank's first sign of life
_LAST_WORD_SECONDS = 0.5  # for the RankFailed message and the output of a rank that ended
_LEAVE_SECONDS = 3.0  # from StopServing to SIGKILL

log = logging.getLogger(__name__)


class WorkerGroup:
    """All ranks of one server.

    `command` is followed by the run directory and the rank. `on_failure` is called once when the group
    has failed; `failure` then says why.
    """

    def __init__(
        self,
        context: Any,
        run: RunDirectory,
        config: ServerConfig,
        on_failure: Callable[[], None],
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self._run, self._config, self._command = run, config, tuple(command)
        self._on_failure = on_failure
        self.world_size = config.tensor_parallel_size
        self.failure: EngineError | None = None
        self.num_blocks = 0
        self.num_host_blocks = 0  # places for blocks in host memory
        self._page = StatusPage(run.status_page, self.world_size, create=True)
        self._plans = [
            open_socket(context, zmq.PUSH, run.plan_address(rank), bind=True)
            for rank in range(self.world_size)
        ]
        self._results = open_socket(context, zmq.SUB, run.results_address, bind=True)
        self._results.setsockopt(zmq.SUBSCRIBE, b"")
        self._outgoing: Codec[ToWorker] = Codec(ToWorker)
        self._incoming: Codec[FromWorker] = Codec(FromWorker)
        self._processes = [RankProcess(rank, self._on_exit) for rank in range(self.world_size)]
        self._greeted: set[int] = set()
        self._loaded: dict[int, RankLoaded] = {}
        self._ready: set[int] = set()
        self._changed = asyncio.Event()  # something of the above did
        self._answers: deque[StepResult] = deque()  # arrived, and nobody has asked for them yet
        self._awaited: asyncio.Future[None] | None = None  # done when the next one is there, or none will be
        self._is_stopping = False
        self._reader: SocketReader | None = None
        self._watch: asyncio.Task[None] | None = None
        self._failing: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------ start

    async def start(self, on_progress: Callable[[str], None]) -> int:
        """Bring all ranks to the point where they take plans; returns the number of KV blocks.

        `on_progress` gets a short text about once a second. Raises EngineError naming a rank that failed,
        ConfigError when the KV cache is too small for one request of full length.
        """
        self._reader = SocketReader(self._results, self._on_message)
        self._watch = asyncio.create_task(self._watch_ranks())
        began = time.monotonic()
        await self._start_processes()
        await self._until(lambda: len(self._greeted) == self.world_size)
        log.info("%s started in %s", count_ranks(self.world_size), seconds_since(began))
        await self._load(on_progress)
        await self._share_out_blocks()
        return self.num_blocks

    async def _start_processes(self) -> None:
        """Several ranks on CPU share the imports; others are started one by one."""
        if self._command == WORKER_COMMAND and self.world_size > 1 and self._config.device != "gpu":
            for process, forked in zip(
                self._processes, await fork_ranks(self._run.root, self.world_size), strict=False
            ):
                process.follow(forked)
        for process in self._processes:
            if not process.is_started:
                await process.start([*self._command, str(self._run.root), str(process.rank)])

    async def _load(self, on_progress: Callable[[str], None]) -> None:
        began, progress = time.monotonic(), LoadingProgress(self._page)
        showing = asyncio.create_task(_show(progress, on_progress))
        try:
            await self._until(lambda: len(self._loaded) == self.world_size)
        finally:
            showing.cancel()
            progress.clear()
        weight_bytes = sum(loaded.weight_bytes for loaded in self._loaded.values())
        devices = sorted({loaded.device for loaded in self._loaded.values()})
        log.info(
            "weights loaded in %s: %.2f GB on %s",
            seconds_since(began),
            weight_bytes / 1e9,
            ", ".join(devices),
        )

    async def _share_out_blocks(self) -> None:
        """As many blocks everywhere as the poorest rank has room for."""
        began, block_size = time.monotonic(), self._config.block_size
        self.num_blocks = min(loaded.max_blocks for loaded in self._loaded.values())
        self.num_host_blocks = min(loaded.max_host_blocks for loaded in self._loaded.values())
        check_context_fits(self._config, self.num_blocks)
        self._send_all(StartServing(self.num_blocks, self.num_host_blocks))
        await self._until(lambda: len(self._ready) == self.world_size)
        log.info(
            "KV cache ready in %s: %d blocks of %d tokens, %d tokens in all",
            seconds_since(began),
            self.num_blocks,
            block_size,
            self.num_blocks * block_size,
        )
        if self.num_host_blocks:
            log.info("swap space: %d more blocks in host memory", self.num_host_blocks)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self.failure:
                raise self.failure
            self._changed.clear()
            await self._changed.wait()

    # ------------------------------------------------------------------ steps

    def send(self, plan: StepPlan) -> None:
        """Give the plan to every rank. They run plans in order, so several may be on their way."""
        if not self.failure:
            self._send_all(plan)

    async def result(self) -> StepResult:
        """Rank 0's answer to the oldest plan not answered yet. Raises EngineError when the group failed."""
        while not self._answers:
            if self.failure:
                raise self.failure
            self._awaited = asyncio.get_running_loop().create_future()
            await self._awaited
        return self._answers.popleft()

    async def has_result(self, seconds: float) -> bool:
        """Whether `result` returns or raises at once, after waiting so long for it at most."""
        if not self._answers and not self.failure:
            loop = asyncio.get_running_loop()
            self._awaited = loop.create_future()
            timer = loop.call_later(seconds, self._wake_result)
            await self._awaited
            timer.cancel()
        return bool(self._answers or self.failure)

    def describe_silence(self) -> str:
        """Which ranks have not beaten for a second, for a health report; empty when all do."""
        silent = self._page.silent_ranks(1.0)
        return f"no sign of life from rank {', '.join(map(str, silent))}" if silent else ""

    # ------------------------------------------------------------------ end

    async def stop(self) -> None:
        """End every rank: politely if all are well, at once if the group failed."""
        self._is_stopping = True
        started = [process for process in self._processes if process.is_started]
        if not self.failure and len(self._ready) == self.world_size:
            self._send_all(StopServing())
            await asyncio.gather(*(process.wait(_LEAVE_SECONDS) for process in started))
        for process in started:
            process.kill()
        await asyncio.gather(*(process.wait() for process in started))
        await self._close()

    async def _close(self) -> None:
        for task in (self._watch, self._failing):
            if task:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if self._reader:
            self._reader.close()
        for socket in (*self._plans, self._results):
            socket.close()
        self._page.close()

    # ------------------------------------------------------------------ what comes in

    def _on_message(self, frames: list[bytes]) -> None:
        try:
            message = self._incoming.decode(frames[-1])
        except msgspec.DecodeError as error:
            self._fail(f"a rank sent a message that cannot be read: {error}", "")
            return
        if isinstance(message, StepResult):
            self._answers.append(message)
            self._wake_result()
            return
        if isinstance(message, RankFailed):
            self._fail(describe_failure(message), "" if _is_for_the_operator(message) else message.traceback)
        elif isinstance(message, RankHello):
            self._greeted.add(message.rank)
        elif isinstance(message, RankLoaded):
            self._loaded[message.rank] = message
        elif isinstance(message, RankReady):
            self._ready.add(message.rank)
        self._changed.set()

    def _on_exit(self, rank: int) -> None:
        """A rank may leave only after StopServing."""
        self._suspect(rank)

    def _suspect(self, rank: int) -> None:
        """The rank is gone. Its last message, which says why, may still be on its way."""
        if not self._is_stopping and not self.failure and not self._failing:
            self._failing = asyncio.create_task(self._fail_after_last_word(rank))

    async def _fail_after_last_word(self, rank: int) -> None:
        await asyncio.sleep(_LAST_WORD_SECONDS)
        process = self._processes[rank]
        end = f"ended unexpectedly ({process.exit_description})"
        sentence = f"rank {rank} {end if process.has_ended else 'is not connected any more'}"
        self._fail(sentence, "\n".join(process.last_lines))

    async def _watch_ranks(self) -> None:
        began = now = time.monotonic()
        while not self.failure:
            await asyncio.sleep(_WATCH_INTERVAL)
            last, now = now, time.monotonic()
            if now - last > _WATCH_INTERVAL + _STARVED:
                continue  # we did not run ourselves; the ranks may have been stopped, too
            for rank in range(self.world_size):
                if silence := self._silence_of(rank, now, began):
                    self._fail(silence, "")
                    break

    def _silence_of(self, rank: int, now: float, began: float) -> str:
        """A sentence about a rank that has been silent for too long, else ''."""
        row = self._page.read(rank)
        if not row.beat:
            late = now - began > _START_SECONDS
            return (
                f"rank {rank} gave no sign of life within {_START_SECONDS:.0f} s of its start" if late else ""
            )
        allowed = self._config.rank_timeout if row.phase >= Phase.READY else _LOADING_SILENCE
        if now - row.beat <= allowed or row.phase == Phase.LEAVING:
            return ""
        doing = Phase(row.phase).name.lower()
        return f"rank {rank} has given no sign of life for {now - row.beat:.0f} s ({doing}, step {row.step})"

    def _fail(self, sentence: str, details: str) -> None:
        """The first failure counts; what follows is its consequence."""
        if self.failure or self._is_stopping:
            return
        self.failure = EngineError(sentence)
        log.error("%s%s", sentence, f"\n{details.rstrip()}" if details else "")
        self._wake_result()
        self._changed.set()
        self._on_failure()

    def _wake_result(self) -> None:
        if self._awaited and not self._awaited.done():
            self._awaited.set_result(None)

    def _send_all(self, message: ToWorker) -> None:
        """Encoded once. A socket without a peer refuses at once instead of blocking: that rank is dead."""
        data = self._outgoing.encode(message)
        rank = 0
        try:
            for rank, socket in enumerate(self._plans):  # noqa: B007
                socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            self._suspect(rank)


def check_context_fits(config: ServerConfig, num_blocks: int) -> None:
    """Raise ConfigError unless one request of full length has room."""
    room = num_blocks * config.block_size
    if room < config.max_model_len:
        raise ConfigError(
            f"the KV cache has room for {room} tokens, fewer than --max-model-len {config.max_model_len}; "
            f"set --max-model-len {room} or less, or give the cache more memory"
        )


def describe_failure(failed: RankFailed) -> str:
    where = f"in step {failed.step}" if failed.step >= 0 else "while starting"
    return f"rank {failed.rank} failed {where}: {failed.message}"


def _is_for_the_operator(failed: RankFailed) -> bool:
    """A wrong setting or checkpoint is one sentence; where it was noticed does not matter."""
    return failed.traceback.rstrip().rpartition("\n")[2].startswith(f"{ConfigError.__module__}.ConfigError")


async def _show(progress: LoadingProgress, on_progress: Callable[[str], None]) -> None:
    """Five times a second for the terminal, once a second for the api."""
    for turn in range(1 << 60):
        now = time.monotonic()
        progress.show(now)
        if turn % 5 == 0:
            on_progress(progress.describe(now))
        await asyncio.sleep(0.2)

"""The engine's end of the sockets, so that a test can drive real worker processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import zmq

from engine.channels import Codec, RunDirectory, open_socket
from engine.config import ServerConfig, write_config
from engine.messages import FromWorker, RankFailed, RankHello, StepPlan, StepResult, ToWorker
from engine.status_page import StatusPage

Expected = TypeVar("Expected")
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 60.0  # seconds for any one message, on a busy machine


class EngineSide:
    """One server's run directory, sockets and rank processes."""

    def __init__(self, run: RunDirectory, config: ServerConfig) -> None:
        self.run, self.world = run, config.tensor_parallel_size
        run.media.mkdir()
        write_config(config, run.config)
        self.page = StatusPage(run.status_page, self.world, create=True)
        self._context = zmq.Context()
        self._results = open_socket(self._context, zmq.SUB, run.results_address, bind=True)
        self._results.setsockopt(zmq.SUBSCRIBE, b"")
        self._plans = [
            open_socket(self._context, zmq.PUSH, run.plan_address(rank), bind=True)
            for rank in range(self.world)
        ]
        self._outgoing: Codec[ToWorker] = Codec(ToWorker)
        self._incoming: Codec[FromWorker] = Codec(FromWorker)
        self._kept: list[FromWorker] = []  # received, not asked for yet
        self.processes: list[subprocess.Popen[bytes]] = []

    def start_ranks(self, module: str = "workers") -> None:
        for rank in range(self.world):
            command = [sys.executable, "-m", module, str(self.run.root), str(rank)]
            self.processes.append(subprocess.Popen(command, cwd=ROOT))

    def send(self, message: ToWorker) -> None:
        for socket in self._plans:
            socket.send(self._outgoing.encode(message))

    def receive(self, kind: type[Expected]) -> Expected:
        """The next message of this kind. Others are kept for later, but a failure is raised at once."""
        while True:
            for message in self._kept:
                if isinstance(message, kind):
                    self._kept.remove(message)
                    return message
            assert self._results.poll(TIMEOUT * 1000), f"no {kind.__name__} within {TIMEOUT:.0f} s"
            self._kept.append(self._incoming.decode(self._results.recv()))
            last = self._kept[-1]
            assert kind in (RankFailed, RankHello) or not isinstance(last, RankFailed), last

    def receive_all(self, kind: type[Expected]) -> list[Expected]:
        """One message of this kind from every rank, in rank order."""
        return sorted((self.receive(kind) for _ in range(self.world)), key=lambda m: m.rank)  # type: ignore[attr-defined]

    def run_step(self, plan: StepPlan) -> StepResult:
        self.send(plan)
        return self.receive(StepResult)

    def exit_codes(self) -> list[int]:
        deadline = time.monotonic() + TIMEOUT
        return [process.wait(deadline - time.monotonic()) for process in self.processes]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for socket in (*self._plans, self._results):
            socket.close()
        self._context.term()
        self.page.close()


@contextmanager
def open_engine_side(config: ServerConfig) -> Iterator[EngineSide]:
    """An engine without ranks; whatever the test starts is ended and cleaned up."""
    # Not tmp_path: a socket's path has to be shorter than what pytest makes.
    root = tempfile.mkdtemp(prefix="octet-test-")
    engine = EngineSide(RunDirectory(root), config)
    try:
        yield engine
    finally:
        engine.close()
        shutil.rmtree(root)


@contextmanager
def running_ranks(config: ServerConfig, **changes: object) -> Iterator[EngineSide]:
    """Real ranks of `config`."""
    with open_engine_side(msgspec.structs.replace(config, **changes)) as engine:
        engine.start_ranks()
        yield engine

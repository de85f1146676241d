"""Real processes for tests: an engine core over fake ranks, and the api's end of its sockets."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq

from engine.channels import Codec, RunDirectory, open_socket
from engine.config import ServerConfig, write_config
from engine.messages import AddRequest, EngineState, RequestOutput, ToApi, ToEngine, TokenBatch
from tests.engine.outputs import outputs_of

ROOT = Path(__file__).resolve().parents[2]
PRESET = ROOT / "models" / "presets" / "ernie-4.5-vl-28b-a3b.json"
PATIENCE = 30.0  # seconds for anything to happen on a busy machine


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def make_server_config(**changes: Any) -> ServerConfig:
    """Two fake ranks, small blocks, ports that are free."""
    port, metrics_port = free_ports(2)
    settings: dict[str, Any] = {
        "model": str(PRESET),
        "display_name": "fake",
        "host": "127.0.0.1",
        "port": port,
        "metrics_port": metrics_port,
        "tensor_parallel_size": 2,
        "quantization": "bfloat16",
        "block_size": 16,
        "max_model_len": 256,
        "max_num_batched_tokens": 64,
        "rank_timeout": 1.0,
        "drain_timeout": 5.0,
    }
    return ServerConfig(**(settings | changes))


def make_run_directory(folder: Path, config: ServerConfig) -> RunDirectory:
    run = RunDirectory(folder)
    run.media.mkdir()
    write_config(config, run.config)
    return run


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Poll until true; returns what was true. Fails with `what`."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s for {what}"
        time.sleep(0.01)
    return value


def processes_naming(text: str) -> list[int]:
    """Process ids whose command line mentions `text`, ourselves excepted; zombies do not count."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            other = entry.name.isdigit() and int(entry.name) != os.getpid()
            if other and text.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def fetch(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE) as answer:
        return answer.read().decode()


class FakeApi:
    """What an api process says and hears; receives never wait longer than PATIENCE."""

    def __init__(self, run: RunDirectory, name: str = "api-0") -> None:
        self._context = zmq.Context()
        identity = name.encode()
        self._requests = open_socket(
            self._context, zmq.DEALER, run.api_address, bind=False, identity=identity
        )
        self._tokens = open_socket(self._context, zmq.SUB, run.tokens_address, bind=False)
        self._tokens.setsockopt(zmq.SUBSCRIBE, identity + b" ")
        self._incoming: Codec[ToApi] = Codec(ToApi)
        self._outgoing: Codec[ToEngine] = Codec(ToEngine)
        self._next_sequence = 0
        self.states: list[EngineState] = []

    def __enter__(self) -> FakeApi:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._requests.close()
        self._tokens.close()
        self._context.term()

    def send(self, message: ToEngine) -> None:
        self._requests.send(self._outgoing.encode(message))

    def send_raw(self, data: bytes) -> None:
        self._requests.send(data)

    def receive(self) -> ToApi:
        assert self._tokens.poll(PATIENCE * 1000), "the engine says nothing"
        message = self._incoming.decode(self._tokens.recv_multipart()[1])
        if isinstance(message, TokenBatch):
            assert message.sequence == self._next_sequence, "a token batch is missing"
            self._next_sequence += 1
        elif isinstance(message, EngineState):
            self.states.append(message)
        return message

    def receive_until(self, condition: Callable[[ToApi], Any]) -> ToApi:
        while not condition(message := self.receive()):
            pass
        return message

    def wait_for_state(self, state: str) -> EngineState:
        if self.states and self.states[-1].state == state:
            return self.states[-1]
        found = self.receive_until(lambda one: isinstance(one, EngineState) and one.state == state)
        assert isinstance(found, EngineState)
        return found

    def outputs_until_finished(self, *request_ids: str) -> dict[str, list[RequestOutput]]:
        """All outputs up to the last one of each named request."""
        outputs: dict[str, list[RequestOutput]] = {name: [] for name in request_ids}
        open_requests = set(request_ids)
        while open_requests:
            message = self.receive()
            for output in outputs_of(message) if isinstance(message, TokenBatch) else ():
                outputs.setdefault(output.request_id, []).append(output)
                if output.finish_reason:
                    open_requests.discard(output.request_id)
        return outputs

    def ask(self, request: AddRequest) -> list[RequestOutput]:
        self.send(request)
        return self.outputs_until_finished(request.request_id)[request.request_id]


class CoreProcess:
    """An engine core in a process of its own, over fake ranks."""

    def __init__(self, run: RunDirectory, behaviour: str, log: Path) -> None:
        self.run = run
        self._log = log
        command = [sys.executable, "-m", "tests.engine.fake_core", behaviour, str(run.root)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def rank_pids(self) -> list[int]:
        return [pid for pid in processes_naming(f"{self.run.root}") if pid != self.process.pid]

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the core does not end:\n{self.log}") from None


@contextlib.contextmanager
def running_core(
    folder: Path, behaviour: str = "well", **config: Any
) -> Iterator[tuple[CoreProcess, FakeApi]]:
    """A core and an api that hears it; whatever the test leaves running is killed."""
    run = make_run_directory(folder, make_server_config(**config))
    core = CoreProcess(run, behaviour, folder / "log")
    try:
        with FakeApi(run) as api:
            yield core, api
    finally:
        core.process.kill()
        core.process.wait()
        wait_until(lambda: not processes_naming(str(run.root)), "the ranks to follow the core")

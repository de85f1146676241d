"""The whole tree of processes, over fake ranks and a fake api: however it ends, nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import write_config
from engine.ready import ready_line
from tests.engine.processes import PATIENCE, ROOT, make_server_config, processes_naming, wait_until


class ServerProcess:
    """A supervisor in a process of its own; `name` is in the command line of everything below it."""

    def __init__(self, folder: Path, rank_behaviour: str, api_behaviour: str, **config) -> None:
        self.config = make_server_config(**config)
        config_file = folder / "config.json"
        write_config(self.config, config_file)
        self._log = folder / "log"
        module = "tests.engine.fake_server"
        command = [sys.executable, "-m", module, rank_behaviour, api_behaviour, str(config_file)]
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
        self.name = f"octet-{self.process.pid}-"

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def run_directories(self) -> list[Path]:
        roots = (Path("/dev/shm"), Path(os.environ.get("TMPDIR", "/tmp")))
        return [path for root in roots for path in root.glob(f"{self.name}*")]

    def wait_until_ready(self) -> None:
        wait_until(lambda: "ready after" in self.log or self.process.poll() is not None, "the ready line")
        assert self.process.poll() is None, self.log

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server does not end:\n{self.log}") from None

    def pids_of(self, module: str) -> list[int]:
        return [pid for pid in processes_naming(self.name) if module.encode() in command_line(pid)]

    def assert_nothing_left(self) -> None:
        wait_until(lambda: not processes_naming(self.name), "all processes to be gone")
        assert self.run_directories == []


@contextlib.contextmanager
def running_server(folder: Path, ranks: str = "well", api: str = "well", **config) -> Iterator[ServerProcess]:
    server = ServerProcess(folder, ranks, api, **config)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not processes_naming(server.name), "the children to follow the supervisor")


def test_ready_line_tells_model_ranks_format_and_a_first_request(tmp_path):
    with running_server(tmp_path) as server:
        server.wait_until_ready()
        (line,) = [line for line in server.log.splitlines() if f"127.0.0.1:{server.config.port}" in line]
        assert "fake in bfloat16 on 2 ranks; try: curl http://127.0.0.1" in line
        assert json.loads(line.split("-d '")[1].rstrip("'"))["messages"]
        for phase in ("2 ranks started in", "weights loaded in", "KV cache ready in"):
            assert phase in server.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_tree_with_exit_code_0(tmp_path, number):
    with running_server(tmp_path) as server:
        server.wait_until_ready()
        assert len(processes_naming(server.name)) == 5  # core, two ranks, api, its decoding process
        assert len(server.run_directories) == 1
        server.send(number)
        assert server.wait() == 0
        server.assert_nothing_left()


def test_the_engine_stays_until_the_api_has_left(tmp_path):
    with running_server(tmp_path, api="open-stream") as server:
        server.wait_until_ready()
        (core,), (api,) = server.pids_of("fake_core"), server.pids_of("fake_api")
        server.send(signal.SIGTERM)
        while is_alive(api):
            core_was_alive = is_alive(core)  # asked first: the api may leave between the two questions
            assert core_was_alive or not is_alive(api)
            time.sleep(0.01)
        assert server.wait() == 0
        server.assert_nothing_left()


def test_a_second_signal_kills_what_does_not_want_to_go(tmp_path):
    with running_server(tmp_path, api="stubborn", drain_timeout=60.0) as server:
        server.wait_until_ready()
        began = time.monotonic()
        server.send(signal.SIGINT)
        wait_until(lambda: "stopping" in server.log, "the drain to begin")
        server.send(signal.SIGINT)
        assert server.wait() == 0
        assert time.monotonic() - began < 10
        server.assert_nothing_left()


def test_an_api_that_ignores_sigterm_is_killed_after_the_drain(tmp_path):
    with running_server(tmp_path, api="stubborn", drain_timeout=0.2) as server:
        server.wait_until_ready()
        server.send(signal.SIGTERM)
        assert server.wait() == 0
        assert "the api did not leave within" in server.log
        server.assert_nothing_left()


def test_a_dead_api_ends_the_server_with_a_failure(tmp_path):
    with running_server(tmp_path, api="die") as server:
        assert server.wait() == 1
        assert "the api ended unexpectedly (exit code 1); the server stops" in server.log
        server.assert_nothing_left()


def test_a_dead_rank_ends_the_server_with_a_failure_that_names_it(tmp_path):
    with running_server(tmp_path, ranks="die-early") as server:
        assert server.wait() == 1
        assert "rank 1 ended unexpectedly (exit code 3)" in server.log
        assert "the engine ended unexpectedly (exit code 1); the server stops" in server.log
        server.assert_nothing_left()


def test_a_killed_core_takes_everything_along(tmp_path):
    with running_server(tmp_path) as server:
        server.wait_until_ready()
        (core,) = server.pids_of("fake_core")
        os.kill(core, signal.SIGKILL)
        assert server.wait() == 1
        assert "the engine ended unexpectedly (killed by SIGKILL)" in server.log
        server.assert_nothing_left()


def test_a_killed_supervisor_takes_processes_and_files_along(tmp_path):
    with running_server(tmp_path) as server:
        server.wait_until_ready()
        server.send(signal.SIGKILL)
        server.wait()
        server.assert_nothing_left()


def test_a_signal_while_loading_ends_the_tree(tmp_path):
    with running_server(tmp_path, ranks="load-for-ever") as server:
        wait_until(lambda: len(processes_naming(server.name)) == 5, "all processes to start")
        server.send(signal.SIGTERM)
        assert server.wait() == 0
        server.assert_nothing_left()


def test_a_wrong_setting_found_by_the_core_is_exit_code_2(tmp_path):
    with running_server(tmp_path, ranks="little-memory") as server:
        assert server.wait() == 2
        assert "set --max-model-len 48" in server.log and "Traceback" not in server.log
        server.assert_nothing_left()


def test_ready_line_names_an_address_that_can_be_reached():
    assert "curl http://127.0.0.1:8000/" in ready_line(make_server_config(host="0.0.0.0", port=8000))
    assert "curl http://[::1]:8000/" in ready_line(make_server_config(host="::", port=8000))
    assert "on 1 rank;" in ready_line(make_server_config(tensor_parallel_size=1))
    assert "Authorization: Bearer YOUR_KEY" in ready_line(make_server_config(api_keys=("k",)))


def command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def is_alive(pid: int) -> bool:
    return bool(command_line(pid))  # empty for a zombie

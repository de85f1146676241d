"""Starts the whole server as a user does, and looks at it from outside: ports, processes, files."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from engine.model_source import TINY_NAME

if TYPE_CHECKING:
    import openai

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 180  # eight ranks on two busy cores
STOP_SECONDS = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A running `run.sh serve`, its log and its two ports."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, metrics_port: int, log: Path) -> None:
        self.process, self.port, self.metrics_port, self._log = process, port, metrics_port, log
        self._clients: list[openai.OpenAI] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def client(self, **options: object) -> openai.OpenAI:
        """Closed with the server, if not before."""
        import openai  # only the tests' environment has it; benchmarks start servers too

        client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, **options)  # type: ignore[arg-type]
        self._clients.append(client)
        return client

    def close_clients(self) -> None:
        """Their sockets with them, which a stream that nobody read to its end keeps open."""
        for client in self._clients:
            client.close()

    def get(self, path: str, port: int | None = None) -> tuple[int, str]:
        """Status and body of a GET; a refused connection is status 0."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port or self.port}{path}", timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except (urllib.error.URLError, ConnectionError):
            return 0, ""

    def metric(self, name: str) -> float:
        """The sum over all label sets of one metric."""
        _, text = self.get("/metrics", self.metrics_port)
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.split("{")[0].split(" ")[0] == name
        ]
        assert values, f"no metric named {name} in:\n{text[:3000]}"
        return sum(values)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.get("/ready")[0] != 200:
            assert self.process.poll() is None, (
                f"the server ended with {self.process.returncode}:\n{self.log}"
            )
            assert time.monotonic() < deadline, f"not ready after {START_SECONDS} s:\n{self.log}"
            time.sleep(0.1)

    def tree(self) -> list[int]:
        """Process ids of the server and everything below it."""
        return [self.process.pid, *descendants(self.process.pid)]

    def stop(self, sent: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal to the server alone and return its exit status."""
        self.process.send_signal(sent)
        return self.process.wait(STOP_SECONDS)


def descendants(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def living(pids: list[int]) -> list[int]:
    """Those of `pids` that still run; zombies waiting for their parent do not count."""
    alive = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                alive.append(pid)
    return alive


def listening_ports(pids: list[int]) -> set[int]:
    """TCP ports, of either address family, on which any of the processes listens."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                ports.add(int(fields[1].rsplit(":", 1)[1], 16))
    return ports


def run_directories(pid: int) -> list[Path]:
    """What a server with this process id keeps in shared memory or the temporary folder."""
    roots = [Path("/dev/shm"), Path(os.environ.get("TMPDIR", "/tmp"))]
    return [path for root in roots if root.is_dir() for path in root.glob(f"octet-{pid}-*")]


def await_true(condition: object, seconds: float, what: str) -> None:
    """Poll a callable until it is true; fail with `what` when the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"after {seconds} s still not: {what}"
        time.sleep(0.05)


@contextlib.contextmanager
def running_server(folder: Path, *flags: str, ready: bool = True, model: str = TINY_NAME) -> Iterator[Server]:
    """`./run.sh FLAGS` on two free ports; killed with its whole tree at the end if a test left it running.

    It serves the tiny random model unless the flags name one; `model` "" is what a newcomer gets.
    """
    if model and "--model" not in flags:
        flags = ("--model", model, *flags)
    port, metrics_port = free_port(), free_port()
    log = folder / f"server-{port}.log"
    environment = {**os.environ, "OCTET_VENV": sys.prefix, "PYTHONUNBUFFERED": "1"}
    command = [str(ROOT / "run.sh"), "--port", str(port), "--metrics-port", str(metrics_port), *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=folder)
    server = Server(process, port, metrics_port, log)
    try:
        if ready:
            server.wait_until_ready()
        yield server
    finally:
        server.close_clients()
        if process.poll() is None:
            tree = server.tree()
            try:
                server.stop()
            except subprocess.TimeoutExpired:
                for pid in tree:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait(STOP_SECONDS)
                raise AssertionError(f"the server did not stop in {STOP_SECONDS} s:\n{server.log}") from None

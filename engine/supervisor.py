"""The root process: starts engine core and api, tells when they are ready, stops them in order, cleans up.

Children live in sessions of their own, so the terminal's Ctrl-C reaches this process alone. The first
SIGINT, SIGTERM or SIGHUP drains: the api finishes its open requests, then the core leaves. The second one
kills. A child that ends unasked ends everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from engine.channels import RunDirectory
from engine.config import ServerConfig
from engine.process import adopt_orphans, describe_exit, environment_for_child
from engine.ready import announce_when_ready

_API_MARGIN = 3.0  # seconds beyond the drain until the api is killed
_CORE_SECONDS = 10.0  # from SIGTERM to SIGKILL
_ORPHAN_SECONDS = 5.0  # for grandchildren whose parent was killed
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Commands:
    """How to start the children; the run directory is appended."""

    core: Sequence[str] = (sys.executable, "-m", "engine.core")
    api: Sequence[str] = (sys.executable, "-m", "api")


class Child:
    """One child process and everything in its session."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._command = command

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            env=environment_for_child(),
        )
        self.ended = asyncio.create_task(self._process.wait())

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode

    async def stop(self, timeout: float) -> None:
        """Ask to leave; kill what is still there after `timeout` seconds."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            await asyncio.wait([self.ended], timeout=timeout)
        if self._process.returncode is None:
            log.warning("%s did not leave within %.0f s and is killed", self.name, timeout)
        self.kill()
        await self.ended

    def kill(self) -> None:
        """The child and its whole session, now."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


class Supervisor:
    """`run` serves until a signal or a failure and returns the exit code of the server."""

    def __init__(self, config: ServerConfig, run: RunDirectory, commands: Commands) -> None:
        self._config = config
        self._core = Child("the engine", [*commands.core, str(run.root)])
        self._api = Child("the api", [*commands.api, str(run.root)])
        self._asked_to_stop = asyncio.Event()

    async def run(self, began: float) -> int:
        """`began` is the time.monotonic() of the server's start, for the ready line."""
        adopt_orphans()
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        await self._core.start()
        await self._api.start()
        announcing = asyncio.create_task(announce_when_ready(self._config, began))
        try:
            return await self._wait()
        finally:
            announcing.cancel()
            await asyncio.gather(announcing, return_exceptions=True)

    async def _wait(self) -> int:
        """Until a signal, or until a child ends that should not."""
        asked = asyncio.create_task(self._asked_to_stop.wait())
        try:
            await asyncio.wait(
                [asked, self._core.ended, self._api.ended], return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            asked.cancel()
        if self._asked_to_stop.is_set():
            await self._drain()
            return 0
        return await self._end_after_failure()

    async def _drain(self) -> None:
        log.info(
            "stopping; open requests have %g s to finish, a second signal ends them",
            self._config.drain_timeout,
        )
        await self._api.stop(self._config.drain_timeout + _API_MARGIN)
        await self._core.stop(_CORE_SECONDS)
        log.info("stopped")

    async def _end_after_failure(self) -> int:
        """One child is gone; the other gets a moment to tell its clients."""
        first = self._core if self._core.ended.done() else self._api
        code = first.exit_code or 0
        log.error("%s ended unexpectedly (%s); the server stops", first.name, describe_exit(code))
        await self._api.stop(_API_MARGIN)
        await self._core.stop(_CORE_SECONDS)
        return code if code in (1, 2) else 1

    def _on_signal(self, number: int) -> None:
        if self._asked_to_stop.is_set():
            log.warning("%s again; killing everything", signal.Signals(number).name)
            self._api.kill()
            self._core.kill()
        self._asked_to_stop.set()


def supervise(config: ServerConfig, run: RunDirectory, began: float, commands: Commands = Commands()) -> int:
    """Run the server whose settings lie in the run directory until it ends; returns its exit code."""
    try:
        return asyncio.run(_supervise(config, run, began, commands))
    finally:
        reap_orphans(_ORPHAN_SECONDS)


async def _supervise(config: ServerConfig, run: RunDirectory, began: float, commands: Commands) -> int:
    return await Supervisor(config, run, commands).run(began)


def reap_orphans(timeout: float) -> None:
    """Wait for grandchildren that were handed to us; their sessions have been killed already."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            time.sleep(0.01)

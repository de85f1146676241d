"""Ranks that one process forks after importing for all of them, and that we adopt when it ends.

The other side is workers/zygote.py. An adopted rank is our child like any other: its exit status is ours to
read and it dies with us. rank_process.py does not see the difference.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.process import adopt_orphans, environment_for_child

ZYGOTE_COMMAND = (sys.executable, "-m", "workers")

log = logging.getLogger(__name__)


class ForkedProcess:
    """What asyncio.subprocess.Process offers, for a child that asyncio did not start."""

    def __init__(self, pid: int, stdout: asyncio.StreamReader) -> None:
        """`pid` must be a child of this process already."""
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None
        self._handle = os.pidfd_open(pid)
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(self._handle, self._on_end)

    def kill(self) -> None:
        """Raises ProcessLookupError when the process has ended."""
        if self.returncode is not None:
            raise ProcessLookupError(self.pid)
        signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    def _on_end(self) -> None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return
        self._loop.remove_reader(self._handle)
        os.close(self._handle)
        self.returncode = os.waitstatus_to_exitcode(status)
        self._ended.set_result(self.returncode)


async def fork_ranks(
    run_directory: Path, world: int, command: Sequence[str] = ZYGOTE_COMMAND
) -> list[ForkedProcess]:
    """One process per rank; an empty list where ranks have to be started one by one."""
    if not hasattr(os, "pidfd_open"):
        return []
    adopt_orphans()
    reading, writing = zip(*(os.pipe() for _ in range(world)), strict=True)
    try:
        pids = await _run_zygote([*command, str(run_directory), ",".join(map(str, writing))], writing)
    finally:
        for descriptor in writing:
            os.close(descriptor)
    if len(pids) != world:
        for descriptor in reading:
            os.close(descriptor)
        return []
    return [
        ForkedProcess(pid, await _open(descriptor)) for pid, descriptor in zip(pids, reading, strict=True)
    ]


async def _run_zygote(command: Sequence[str], writing: Sequence[int]) -> list[int]:
    """The process ids that it prints. It has ended then, so they are ours."""
    zygote = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        env=environment_for_child(),
        pass_fds=writing,
    )
    try:
        printed, _ = await zygote.communicate()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            zygote.kill()
        await zygote.wait()
        raise
    if zygote.returncode:
        log.info("the ranks are started one by one (exit code %d of the process that would fork them)",
                 zygote.returncode)  # fmt: skip
        return []
    return [int(word) for word in printed.split()]


async def _open(descriptor: int) -> asyncio.StreamReader:
    stream = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(stream)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(descriptor, "rb", 0))
    return stream

"""One rank as an operating-system process: started, listened to, ended.

What it prints goes to our stderr with its name in front, and its last lines are kept, because they tell
why it died. What it says on the sockets is worker_group.py's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import deque
from collections.abc import Callable, Sequence

from engine.forked_ranks import ForkedProcess
from engine.process import clear_line, describe_exit, environment_for_child

_TAIL_LINES = 20
_CHUNK_BYTES = 1 << 16


class RankProcess:
    def __init__(self, rank: int, on_exit: Callable[[int], None]) -> None:
        self.rank = rank
        self._on_exit = on_exit  # called with the rank when the process has ended
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._process: asyncio.subprocess.Process | ForkedProcess | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, command: Sequence[str]) -> None:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment_for_child(),
        )
        self.follow(process)

    def follow(self, process: asyncio.subprocess.Process | ForkedProcess) -> None:
        """Listen to a process that runs already."""
        self._process = process
        self._task = asyncio.create_task(self._follow(process))

    @property
    def is_started(self) -> bool:
        return self._process is not None

    @property
    def has_ended(self) -> bool:
        return self._process is not None and self._process.returncode is not None

    @property
    def exit_description(self) -> str:
        code = self._process.returncode if self._process else None
        return "still running" if code is None else describe_exit(code)

    @property
    def last_lines(self) -> list[str]:
        return list(self._tail)

    def kill(self) -> None:
        """Does nothing when the process has ended or was never started."""
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def wait(self, timeout: float | None = None) -> bool:
        """True when the process has ended and its output is read; False when that took longer."""
        if self._task is None:
            return True
        done, _ = await asyncio.wait([self._task], timeout=timeout)
        return bool(done)

    async def _follow(self, process: asyncio.subprocess.Process | ForkedProcess) -> None:
        assert process.stdout is not None
        await self._read_output(process.stdout)
        await process.wait()
        self._on_exit(self.rank)

    async def _read_output(self, stream: asyncio.StreamReader) -> None:
        """Line by line, but a line without an end must not grow for ever."""
        rest = b""
        while data := await stream.read(_CHUNK_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > _CHUNK_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._pass_on(line)
        if rest:
            self._pass_on(rest)

    def _pass_on(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self._tail.append(text)
            # The ranks' own log lines carry their name already.
            name = "" if f"rank {self.rank}" in text[:24] else f"[rank {self.rank}] "
            sys.stderr.write(f"{clear_line()}{name}{text}\n")

"""Fails a test in which something blocks the event loop.

A heartbeat on the loop measures its own delay; the time the thread only waited for a core (another process
was busy) is taken out, so a loaded machine does not fail tests. A second thread notes where the loop stood.
A virtual machine that stands still, or its disk, looks the same from inside: a test found blocked runs once
more, since what the code does wrong it does each time.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import uvloop

BEAT = 0.01  # seconds
LIMIT = 0.25  # seconds in one piece that a loop may be deaf


class EventLoopBlocked(AssertionError):
    pass


class LoopGuard:
    """Use as an async context manager on the loop to watch."""

    def __init__(self, limit: float = LIMIT) -> None:
        self._limit = limit
        self._worst = 0.0
        self._where = ""

    async def __aenter__(self) -> LoopGuard:
        self._thread = threading.get_ident()
        self._beat, self._waited = time.monotonic(), _seconds_without_core()
        self._stop = threading.Event()
        self._task = asyncio.create_task(self._heartbeat())
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    async def __aexit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._measure()
        self._task.cancel()
        self._stop.set()
        self._watcher.join()
        if failure is None and self._worst > self._limit:
            raise EventLoopBlocked(f"the event loop was blocked for {self._worst:.2f} s at\n{self._where}")

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            self._measure()

    def _measure(self) -> None:
        now, waited = time.monotonic(), _seconds_without_core()
        self._worst = max(self._worst, now - self._beat - BEAT - (waited - self._waited))
        self._beat, self._waited = now, waited

    def _watch(self) -> None:
        """Keep the stack of the longest silence seen so far."""
        longest = self._limit / 2
        while not self._stop.wait(self._limit / 5):
            silence = time.monotonic() - self._beat
            if silence > longest:
                longest = silence
                frame = sys._current_frames().get(self._thread)
                self._where = "".join(traceback.format_stack(frame)[-8:]) if frame else ""


def run_guarded(test: Callable[[], Coroutine[Any, Any, None]], limit: float = LIMIT) -> None:
    """Run a coroutine test on uvloop, as the api does, under a guard; fail if it blocks the loop twice."""

    async def guarded() -> None:
        async with LoopGuard(limit):
            await test()

    try:
        uvloop.run(guarded())
    except EventLoopBlocked as blocked:
        print(f"once more, since {blocked}")
        uvloop.run(guarded())


def _seconds_without_core() -> float:
    """How long this thread was ready to run and had no core; 0 where the kernel does not say."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0

"""One shared page on which every rank writes how it is doing; the engine only reads.

A rank beats from its main loop and once per layer while computing, so that a rank stuck in one place
goes silent although its process lives. Loading progress travels the same way.
"""

from __future__ import annotations

import mmap
import time
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

# A row: beat (monotonic seconds, a double), then pid, phase, bytes loaded, bytes to load, step (int64).
_ROW_ITEMS, _ITEM_BYTES = 8, 8
_ROW_BYTES = _ROW_ITEMS * _ITEM_BYTES


class Phase(IntEnum):
    ABSENT = 0
    STARTING = 1
    LOADING = 2
    READY = 3
    RUNNING = 4
    LEAVING = 5


class RankStatus(NamedTuple):
    """beat is time.monotonic() of the rank's last sign of life, comparable across processes."""

    beat: float
    pid: int
    phase: int
    bytes_loaded: int
    bytes_total: int
    step: int


class StatusPage:
    """`world_size` rows in a mapped file; each row has one writer.

    An item is written by one aligned store, so a reader in another process sees the old value or the new one.
    (struct.pack_into clears a row before it fills it: a reader could meet a heart that has never beaten.)
    """

    def __init__(self, path: Path, world_size: int, *, create: bool = False) -> None:
        if create:
            path.write_bytes(bytes(_ROW_BYTES * world_size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _ROW_BYTES * world_size)
        self._beats = memoryview(self._map).cast("d")
        self._numbers = memoryview(self._map).cast("q")
        self.world_size = world_size

    def read(self, rank: int) -> RankStatus:
        first = rank * _ROW_ITEMS
        return RankStatus(self._beats[first], *self._numbers[first + 1 : first + len(RankStatus._fields)])

    def write(self, rank: int, status: RankStatus) -> None:
        """The beat last: what it stands for is there by then."""
        first, (beat, *numbers) = rank * _ROW_ITEMS, status
        for index, number in enumerate(numbers, first + 1):
            self._numbers[index] = number
        self._beats[first] = beat

    def silent_ranks(self, timeout: float) -> list[int]:
        """Ranks that have begun to beat and have not for `timeout` seconds."""
        now = time.monotonic()
        rows = [(rank, self.read(rank)) for rank in range(self.world_size)]
        return [rank for rank, row in rows if row.beat and now - row.beat > timeout]

    def close(self) -> None:
        self._beats.release()
        self._numbers.release()
        self._map.close()


class Heart:
    """A rank's own row of the page."""

    def __init__(self, page: StatusPage, rank: int, pid: int) -> None:
        self._page, self._rank = page, rank
        self._status = RankStatus(0.0, pid, Phase.STARTING, 0, 0, 0)

    def beat(self, **changes: int) -> None:
        """Say that the rank is alive; `changes` name fields of RankStatus."""
        self._status = self._status._replace(beat=time.monotonic(), **changes)  # type: ignore[arg-type]
        self._page.write(self._rank, self._status)

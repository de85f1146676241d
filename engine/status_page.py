"""One shared page on which every rank writes how it is doing; the engine only reads.

A rank beats from its main loop and once per layer while computing, so that a rank stuck in one place
goes silent although its process lives. Loading progress travels the same way.
"""

from __future__ import annotations

import mmap
import struct
import time
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

# beat (monotonic seconds), pid, phase, bytes loaded, bytes to load, step
_ROW = struct.Struct("=dqqqqq")
_ROW_BYTES = 64


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
    """`world_size` rows in a mapped file; each row has one writer."""

    def __init__(self, path: Path, world_size: int, *, create: bool = False) -> None:
        if create:
            path.write_bytes(bytes(_ROW_BYTES * world_size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _ROW_BYTES * world_size)
        self.world_size = world_size

    def read(self, rank: int) -> RankStatus:
        return RankStatus(*_ROW.unpack_from(self._map, rank * _ROW_BYTES))

    def write(self, rank: int, status: RankStatus) -> None:
        _ROW.pack_into(self._map, rank * _ROW_BYTES, *status)

    def silent_ranks(self, timeout: float) -> list[int]:
        """Ranks that have begun to beat and have not for `timeout` seconds."""
        now = time.monotonic()
        rows = [(rank, self.read(rank)) for rank in range(self.world_size)]
        return [rank for rank, row in rows if row.beat and now - row.beat > timeout]

    def close(self) -> None:
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

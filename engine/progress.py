"""Shows how far loading is: one moving line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

from engine.status_page import Phase, StatusPage

_BAR_WIDTH = 28
_PLAIN_INTERVAL = 5.0  # seconds between lines when nobody watches a terminal
_STALLED_AFTER = 10.0  # seconds in which a rank loads nothing, until it is named

log = logging.getLogger(__name__)


class LoadingProgress:
    """Sums the ranks' rows of the status page; bytes over all ranks."""

    def __init__(self, page: StatusPage, stream: TextIO = sys.stderr) -> None:
        self._page = page
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._started: float | None = None  # when the first byte was loaded
        self._last_line = 0.0
        self._is_drawn = False
        self._advanced: dict[int, tuple[int, float]] = {}  # rank -> bytes, and when they were seen first

    def describe(self, now: float) -> str:
        """'weights 3.20 of 27.00 GB, 1.10 GB/s, 22 s left', or which ranks are still starting.

        Ranks that have loaded nothing for a while are named.
        """
        rows = [self._page.read(rank) for rank in range(self._page.world_size)]
        loaded, total = sum(row.bytes_loaded for row in rows), sum(row.bytes_total for row in rows)
        if not total:
            begun = sum(row.phase >= Phase.LOADING for row in rows)
            return f"starting ranks, {begun} of {len(rows)} ready to load"
        if self._started is None:
            self._started = now
        text = f"weights {loaded / 1e9:.2f} of {total / 1e9:.2f} GB"
        rate = loaded / (now - self._started) if now > self._started else 0.0
        if rate and loaded < total:
            text += f", {rate / 1e9:.2f} GB/s, {(total - loaded) / rate:.0f} s left"
        return text + "".join(f"; {stalled}" for stalled in self._stalled_ranks(now))

    def describe_ranks(self) -> str:
        """'rank 0 45 %, rank 1 51 %': each rank's part of its own bytes."""
        rows = [self._page.read(rank) for rank in range(self._page.world_size)]
        return ", ".join(
            f"rank {rank} {100 * row.bytes_loaded // row.bytes_total if row.bytes_total else 0} %"
            for rank, row in enumerate(rows)
        )

    def _stalled_ranks(self, now: float) -> list[str]:
        """'rank 3 has loaded nothing for 12 s (at 0.50 of 3.40 GB)'."""
        found = []
        for rank in range(self._page.world_size):
            row = self._page.read(rank)
            seen, since = self._advanced.get(rank, (-1, now))
            if row.bytes_loaded != seen:
                self._advanced[rank] = (row.bytes_loaded, now)
            elif row.bytes_loaded < row.bytes_total and now - since >= _STALLED_AFTER:
                place = f"{row.bytes_loaded / 1e9:.2f} of {row.bytes_total / 1e9:.2f} GB"
                found.append(f"rank {rank} has loaded nothing for {now - since:.0f} s (at {place})")
        return found

    def show(self, now: float) -> None:
        """Call it several times a second."""
        if self._is_terminal:
            self._stream.write(f"\r\x1b[K{self._bar()}{self.describe(now)}")
            self._stream.flush()
            self._is_drawn = True
        elif now - self._last_line >= _PLAIN_INTERVAL:
            if self._last_line:
                ranks = f" ({self.describe_ranks()})" if self._page.world_size > 1 else ""
                log.info("%s%s", self.describe(now), ranks)
            self._last_line = now

    def clear(self) -> None:
        """Make room for ordinary lines."""
        if self._is_drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._is_drawn = False

    def _bar(self) -> str:
        rows = [self._page.read(rank) for rank in range(self._page.world_size)]
        total = sum(row.bytes_total for row in rows)
        filled = _BAR_WIDTH * sum(row.bytes_loaded for row in rows) // total if total else 0
        return f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] "


def seconds_since(begin: float) -> str:
    """'1.2 s' since a time.monotonic() value."""
    return f"{time.monotonic() - begin:.1f} s"


def count_ranks(world_size: int) -> str:
    return "1 rank" if world_size == 1 else f"{world_size} ranks"

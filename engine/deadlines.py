"""Which requests have to end when, whether they are finished or not."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from engine.sequence import Sequence

_SLACK = 64  # finished sequences tolerated before they are thrown out


class Deadlines:
    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Sequence]] = []  # heap; may hold finished sequences
        self._many = _SLACK

    def __len__(self) -> int:
        return len(self._entries)

    def watch(self, sequence: Sequence) -> None:
        """A sequence without a deadline is ignored."""
        if not sequence.deadline:
            return
        if len(self._entries) > self._many:
            self._entries = [entry for entry in self._entries if not entry[2].is_finished]
            heapq.heapify(self._entries)
            self._many = 2 * len(self._entries) + _SLACK
        heapq.heappush(self._entries, (sequence.deadline, sequence.seq_id, sequence))

    def take_overdue(self, now: float) -> Iterator[Sequence]:
        """Those whose time is over, each once."""
        while self._entries and self._entries[0][0] <= now:
            sequence = heapq.heappop(self._entries)[2]
            if not sequence.is_finished:
                yield sequence

"""Who waits to run, and who is next: preempted sequences first, then by priority, then by arrival.

Bounded for newcomers; a preempted sequence always gets back in. Every operation costs at most the
logarithm of the queue's length.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

from engine.sequence import Sequence

_SLACK = 64  # dead entries tolerated before the heap is rebuilt


class WaitingQueue:
    def __init__(self, max_size: int) -> None:
        self.max_size = max_size  # newcomers beyond it are refused
        self._members: dict[int, Sequence] = {}  # by seq_id: the truth; the two below may hold dead entries
        self._preempted: deque[Sequence] = deque()
        self._newcomers: list[tuple[int, float, int, Sequence]] = []  # heap of (priority, arrival, seq_id)

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._members.values())

    def try_add(self, sequence: Sequence) -> bool:
        """Queue a new sequence; False when the queue is full."""
        if len(self._members) >= self.max_size:
            return False
        self._members[sequence.seq_id] = sequence
        heapq.heappush(self._newcomers, (sequence.priority, sequence.arrival, sequence.seq_id, sequence))
        return True

    def put_back(self, sequence: Sequence) -> None:
        """A preempted sequence goes to the front."""
        self._members[sequence.seq_id] = sequence
        self._preempted.appendleft(sequence)

    def first(self) -> Sequence | None:
        """Who is next; stays queued."""
        while self._preempted:
            if self._preempted[0].seq_id in self._members:
                return self._preempted[0]
            self._preempted.popleft()
        while self._newcomers:
            sequence = self._newcomers[0][3]
            if sequence.seq_id in self._members:
                return sequence
            heapq.heappop(self._newcomers)
        return None

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence that is admitted, aborted or failed."""
        del self._members[sequence.seq_id]
        if len(self._newcomers) > 2 * len(self._members) + _SLACK:
            self._newcomers = [entry for entry in self._newcomers if entry[2] in self._members]
            heapq.heapify(self._newcomers)

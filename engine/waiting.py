"""Who waits to run, and in which order they may try: preempted sequences first, then classes of priority.

Inside a class the tenants take turns by what they were given so far (fairness.py), and a tenant's own
requests go by arrival. Bounded for newcomers; a preempted sequence always gets back in. Looking at the next
one costs at most the logarithm of the queue's length.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter
from collections.abc import Callable, Generator, Iterator

from engine.fairness import Account, Accounts
from engine.sequence import Sequence

_SLACK = 64  # dead entries tolerated before a line is rebuilt

Entry = tuple[float, int, Sequence]  # arrival or seniority, seq_id, and whose they are
HeldBack = Callable[[str], bool]  # whether a tenant has to let others go first


def _nobody(tenant: str) -> bool:
    return False


class Line:
    """Waiting sequences of one tenant in one class, by arrival. May hold dead entries."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self.entries: list[Entry] = []  # heap

    def push(self, entry: Entry) -> None:
        heapq.heappush(self.entries, entry)


Turn = tuple[float, int, Line]  # what its tenant was served when it was pushed, a tie-breaker, and whose


class PriorityClass:
    """The lines of one priority, those of the least served tenants first."""

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}  # by tenant; only those with entries
        self._turns: list[Turn] = []  # heap by what was served when it was pushed
        self._num_pushed = 0  # breaks ties: who came first

    def push(self, entry: Entry, account: Account) -> None:
        line = self.lines.get(account.tenant)
        if line is None:
            line = self.lines[account.tenant] = Line(account)
            self._take_turn(line)
        line.account = account
        line.push(entry)

    def pop(self, is_held_back: HeldBack) -> Entry | None:
        """The next entry, dead or alive. Lines of tenants that are held back come after all others."""
        aside: list[Turn] = []
        while (turn := self._next_turn()) and is_held_back(turn[2].account.tenant):
            aside.append(turn)
        for one in aside:
            heapq.heappush(self._turns, one)
        turn = turn or self._next_turn()
        if turn is None:
            return None
        line = turn[2]
        entry = heapq.heappop(line.entries)
        self._take_turn(line)
        return entry

    def _next_turn(self) -> Turn | None:
        """Whose turn it is by what the accounts say now; taken out of the heap."""
        while self._turns:
            turn = heapq.heappop(self._turns)
            served, _, line = turn
            if not line.entries:
                del self.lines[line.account.tenant]
            elif served < line.account.served:
                self._take_turn(line)  # it was served since: behind those that were not
            else:
                return turn
        return None

    @property
    def num_entries(self) -> int:
        return sum(len(line.entries) for line in self.lines.values())

    def prune(self, members: dict[int, Sequence]) -> None:
        for line in self.lines.values():
            line.entries = [entry for entry in line.entries if entry[1] in members]
            heapq.heapify(line.entries)

    def _take_turn(self, line: Line) -> None:
        self._num_pushed += 1
        heapq.heappush(self._turns, (line.account.served, self._num_pushed, line))


class WaitingQueue:
    def __init__(self, max_size: int, accounts: Accounts | None = None) -> None:
        self.max_size = max_size  # newcomers beyond it are refused
        self.accounts = Accounts() if accounts is None else accounts
        self._members: dict[int, Sequence] = {}  # by seq_id: the truth; the rest may hold dead entries
        self._preempted: list[Entry] = []  # heap by seniority
        self._classes: dict[int, PriorityClass] = {}
        self._priorities: list[int] = []  # of `_classes`, in order
        self._num_entries = 0  # dead and alive, of newcomers
        self.num_added = 0  # newcomers in all this time

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._members.values())

    def try_add(self, sequence: Sequence) -> bool:
        """Queue a new sequence; False when the queue is full."""
        if len(self._members) >= self.max_size:
            return False
        self._members[sequence.seq_id] = sequence
        self._push((sequence.arrival, sequence.seq_id, sequence))
        self.num_added += 1
        return True

    def put_back(self, sequence: Sequence, in_line: bool = False) -> None:
        """A preempted sequence goes to the front, behind those that ran before it.

        `in_line`: to the place of its arrival among those of its tenant, which had more than its share.
        """
        self._members[sequence.seq_id] = sequence
        if in_line:
            self._push((sequence.arrival, sequence.seq_id, sequence))
            return
        heapq.heappush(self._preempted, (sequence.seniority, sequence.seq_id, sequence))

    def candidates(self, is_held_back: HeldBack = _nobody) -> Generator[Sequence, None, None]:
        """Everyone in the order in which they may try to run; a caller may `drop` the one it just got.

        Those whose tenant `is_held_back` come last of their class, and if they were preempted, last of all.
        Take as many as needed and close the iterator, before anything is added.
        """
        passed: list[Entry] = []  # popped, in whichever heap they were
        preempted: list[Entry] = []
        try:
            yield from self._take_preempted(preempted, lambda one: not is_held_back(one.tenant))
            for priority in list(self._priorities):
                # A `drop` of the caller may have thrown out classes of which all were dead.
                while (one := self._classes.get(priority)) and (entry := one.pop(is_held_back)):
                    self._num_entries -= 1
                    if entry[1] in self._members:
                        passed.append(entry)
                        yield entry[2]
                if self._classes.pop(priority, None):  # nobody is left; who was passed over founds it again
                    self._priorities.remove(priority)
            held_back = sorted(entry for entry in preempted if entry[1] in self._members)
            yield from (entry[2] for entry in held_back if is_held_back(entry[2].tenant))
        finally:
            for entry in preempted:
                if entry[1] in self._members:
                    heapq.heappush(self._preempted, entry)
            for entry in passed:
                if entry[1] in self._members:
                    self._push(entry)

    def _take_preempted(
        self, taken: list[Entry], may_try: Callable[[Sequence], bool]
    ) -> Generator[Sequence, None, None]:
        """Those that were preempted, out of their heap into `taken`."""
        while self._preempted:
            entry = heapq.heappop(self._preempted)
            if entry[1] in self._members:
                taken.append(entry)
                if may_try(entry[2]):
                    yield entry[2]

    def first(self) -> Sequence | None:
        """Who is next; stays queued."""
        walk = self.candidates()
        sequence = next(walk, None)
        walk.close()
        return sequence

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence that is admitted, aborted or failed."""
        del self._members[sequence.seq_id]
        if self._num_entries > 2 * len(self._members) + _SLACK:
            self._prune()

    def _push(self, entry: Entry) -> None:
        sequence = entry[2]
        if sequence.priority not in self._classes:
            self._classes[sequence.priority] = PriorityClass()
            insort(self._priorities, sequence.priority)
        self._classes[sequence.priority].push(entry, self.accounts.of(sequence.tenant))
        self._num_entries += 1

    def _prune(self) -> None:
        """Drop dead entries, and classes that nobody waits in."""
        live: Counter[int] = Counter(one.priority for one in self._members.values())
        self._classes = {priority: one for priority, one in self._classes.items() if live[priority]}
        self._priorities = sorted(self._classes)
        for one in self._classes.values():
            one.prune(self._members)
        self._num_entries = sum(one.num_entries for one in self._classes.values())

"""Everything live and where it stands: who waits, who runs, which steps are under way, what is to be said.

The books that planning.py and applying.py share, and the few moves between them: a sequence enters, starts to
run, is preempted, ends. Why anyone moves is decided there and in scheduler.py.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

from engine.config import ServerConfig
from engine.deadlines import Deadlines
from engine.decode_batch import DecodeBatch
from engine.errors import EngineError
from engine.fairness import Accounts
from engine.flight import Flight
from engine.kv_manager import KVManager, Prefix
from engine.messages import RequestOutput
from engine.outbox import Outbox
from engine.prefix_cache import extend_keys
from engine.sequence import Sequence, Status
from engine.step_log import StepLog
from engine.stopping import FinishReason
from engine.waiting import WaitingQueue

MOST_FLIGHTS = 2  # steps that were sent and not applied


class LiveSequences:
    """All sequences between `enter` and `finish`."""

    def __init__(self, config: ServerConfig, num_blocks: int, num_host_blocks: int = 0) -> None:
        self.kv = KVManager(num_blocks, config.block_size, config.enable_prefix_caching, num_host_blocks)
        self.accounts = Accounts(config.tenant_weights)
        self.waiting = WaitingQueue(config.max_waiting, self.accounts)
        self.running: list[Sequence] = []  # by seniority: blocks are taken from those behind
        self.decoding = DecodeBatch()  # most of `running`
        self.by_request: dict[str, Sequence] = {}
        self.flights: deque[Flight] = deque()  # steps that were planned and not applied, the oldest first
        self.dropped: list[int] = []  # the ranks still know them, the next plan says to forget
        self.deadlines = Deadlines()
        self.outbox = Outbox()
        self.log = StepLog()
        self.num_preemptions = 0
        self._num_admitted = 0

    def place_of(self, sequence: Sequence) -> int:
        """Its index in `running`."""
        return bisect_left(self.running, sequence.seniority, key=_seniority)

    def num_spare_blocks(self, sequence: Sequence, promised: int) -> int:
        """Free blocks that a waiting sequence may take; `promised` ones are for prompts that run."""
        reserve = self.kv.pool.num_blocks // 100 if self.running else 0
        if sequence.num_preemptions:
            reserve += len(self.running)  # else it would soon have to go again
        return self.kv.pool.num_free - promised - reserve

    # ------------------------------------------------------------------ moves

    def try_enter(self, sequence: Sequence) -> bool:
        """Queue a new sequence; False when the queue is full."""
        if not self.waiting.try_add(sequence):
            return False
        if self.kv.caches_prefixes:
            extend_keys(sequence, self.kv.block_size)  # now rather than when the ranks wait for a plan
        self.accounts.enter(sequence)
        self.deadlines.watch(sequence)
        self.by_request[sequence.request_id] = sequence
        return True

    def start(self, sequence: Sequence, prefix: Prefix, now: float) -> None:
        """A waiting sequence begins to run, with the cached blocks of `prefix`."""
        self.waiting.drop(sequence)
        self.kv.begin_with(sequence, prefix)
        sequence.num_tokens_at_admission = sequence.num_filled_tokens = sequence.num_computed_tokens
        sequence.is_filled = False
        if not sequence.first_scheduled:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self._num_admitted += 1
            sequence.seniority = self._num_admitted
            self.log.name(sequence.seq_id, sequence.request_id)
        self.accounts.admit(sequence)
        insort(self.running, sequence, key=_seniority)
        sequence.status = Status.RUNNING
        sequence.first_scheduled = sequence.first_scheduled or now
        if sequence.num_preemptions:
            sequence.preempted_seconds += now - sequence.preempted_at

    def preempt(self, sequence: Sequence, flight: Flight, reason: str) -> None:
        """Take all blocks of a sequence; its tokens stay, and what is lost is computed again later.

        A token of it that is in flight still counts, and is there before it can start again.
        """
        sequence.num_tokens_at_preemption = sequence.num_tokens
        self._stop_running(sequence)
        sequence.status = Status.WAITING
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        sequence.preempted_at = flight.now
        self.num_preemptions += 1
        self.outbox.preemptions[reason] += 1
        self.waiting.put_back(sequence, in_line=reason == "share")
        flight.preempted.append(sequence.request_id)

    def finish(self, sequence: Sequence, reason: FinishReason, last_output: RequestOutput) -> None:
        """End a live sequence. What steps in flight compute for it is nobody's."""
        if sequence.is_waiting:
            self.waiting.drop(sequence)
        else:
            self._stop_running(sequence)
        self.accounts.leave(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        del self.by_request[sequence.request_id]
        for flight in self.flights:
            flight.has_gaps = True
        self.outbox.add(sequence.client, last_output)
        self.outbox.finished.append(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        """Its blocks go at once, even those that a step in flight writes to: the ranks run steps in order, so
        whoever gets them writes later. Only what was applied becomes known to the prefix cache.
        """
        del self.running[self.place_of(sequence)]
        self.decoding.leave(sequence)
        self.accounts.stop(sequence)
        self.kv.release(sequence)
        self.dropped.append(sequence.seq_id)

    # ------------------------------------------------------------------ proof

    def recount(self) -> None:
        """Raise EngineError unless every block has exactly its owners and every list the right members."""
        self.kv.recount(self.running, self.waiting)
        listed = {sequence.request_id: sequence for sequence in (*self.running, *self.waiting)}
        if listed != self.by_request:
            raise EngineError("the live requests are not those running and waiting")
        if any(not one.is_running for one in self.running) or any(not one.is_waiting for one in self.waiting):
            raise EngineError("a sequence's status contradicts the list it is in")
        if self.running != sorted(self.running, key=_seniority):
            raise EngineError("the running sequences are not in order of seniority")
        self.decoding.recount(self.running)
        self.accounts.recount(self.running, self.waiting)
        if len(self.flights) > MOST_FLIGHTS:
            raise EngineError(f"{len(self.flights)} steps are in flight, at most {MOST_FLIGHTS} may be")


def _seniority(sequence: Sequence) -> int:
    return sequence.seniority

"""Who computes how many tokens in the next step: running sequences first, then waiting ones.

A sequence needs `num_tokens - num_computed_tokens` more. Prefill, a chunk of it and decode differ only in how
large that number is. The step's limits are in budget.py and pacing.py, who gives way is in preemption.py, and
what the result means is in applying.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.block_pool import BlockId
from engine.budget import StepBudget
from engine.config import ServerConfig
from engine.flight import Fill, Flight
from engine.kv_manager import Prefix
from engine.live import LiveSequences
from engine.messages import Chunk
from engine.pacing import Pacing
from engine.preemption import choose_victim
from engine.sequence import Sequence
from engine.shares import Shares

_LOOK_AHEAD = 32  # waiting sequences that may be passed over in one step because they do not fit
_MOST_OVERTAKEN = 16  # later ones admitted before one that did not fit; then it is waited for


class Planner:
    """Fills one flight after the other. Works while a step is in flight, whose tokens nobody knows yet."""

    def __init__(self, config: ServerConfig, live: LiveSequences, pacing: Pacing) -> None:
        self._config, self._live, self._pacing = config, live, pacing
        self._kv = live.kv
        self._shares = Shares(config, live, pacing)
        self._stuck_at: tuple[int, ...] = ()  # `_queue_state` when nobody who was tried had blocks

    def plan(self, now: float) -> Flight:
        """Choose the tokens of a step; blocks are taken and sequences moved at once."""
        flight = Flight(now)
        self._shares.make_way(flight)
        num_made_way, filling = len(flight.preempted), self._filling()
        budget = self._make_budget(filling, now)
        self._continue_running(filling, flight, budget)
        if len(flight.preempted) == num_made_way:  # else blocks are short
            self._admit_waiting(flight, budget)
        self._let_join(flight)
        return flight

    def _make_budget(self, filling: list[Sequence], now: float) -> StepBudget:
        """A token is kept for everyone who decodes; prompts are held back only where answers run."""
        live, config = self._live, self._config
        decodes = bool(live.decoding.members) or any(one.first_token for one in live.running)
        at_most = self._pacing.num_prefill_tokens if decodes else config.max_num_batched_tokens
        budget = StepBudget.from_config(config, len(live.running), at_most)
        budget.num_tokens -= len(live.decoding.members)
        budget.quotas = self._shares.quotas(filling, budget.num_prefill_tokens, now)
        return budget

    # ------------------------------------------------------------------ running sequences

    def _continue_running(self, filling: list[Sequence], flight: Flight, budget: StepBudget) -> None:
        """Whoever decodes computes a token. The few who need more than that are looked at by seniority.

        The admission keeps len(running) within the budget, so there is a token for everyone.
        """
        busy = self._live.decoding.take_due()
        if len(busy) <= self._kv.pool.num_free:
            self._grow_all(busy, flight)
            needy = filling
        else:
            needy = sorted(busy + filling, key=_seniority)
        num_behind = len(filling)
        for sequence in needy:
            num_behind -= not sequence.is_decoding
            if sequence.is_decoding:
                self._grow(sequence, flight)
            elif sequence.is_running:  # else it gave way to an older one
                self._fill(sequence, num_behind, flight, budget)
        self._decode(busy, flight)

    def _filling(self) -> list[Sequence]:
        """Running sequences that do not decode yet."""
        live = self._live
        if len(live.running) == len(live.decoding.members):
            return []
        return [one for one in live.running if not one.is_decoding and not one.has_all_tokens]

    def _grow_all(self, busy: list[Sequence], flight: Flight) -> None:
        """Make sure that the next token of each has a slot; there are blocks for all."""
        flight.grown = [one for one in busy if one.num_computed_tokens >= one.num_slots]
        self._kv.grow_all(flight.grown)
        for sequence in flight.grown:
            self._live.accounts.grow(sequence, sequence.num_computed_tokens)

    def _grow(self, sequence: Sequence, flight: Flight) -> None:
        """The same for one of them, when blocks are short."""
        if sequence.num_computed_tokens < sequence.num_slots:
            return
        num_computed = sequence.num_computed_tokens
        if self._make_room(sequence, num_computed + 1, flight):
            flight.grown.append(sequence)
            self._kv.grow_all([sequence])
            self._live.accounts.grow(sequence, num_computed)

    def _fill(self, sequence: Sequence, num_behind: int, flight: Flight, budget: StepBudget) -> None:
        """The next chunk of a prompt, with a token kept for every other prompt behind it."""
        begin = sequence.num_computed_tokens
        num_tokens = budget.next_chunk(sequence, begin, kept_back=num_behind)
        if num_tokens and self._make_room(sequence, begin + num_tokens, flight):
            self._plan_chunk(sequence, num_tokens, flight, budget)

    def _decode(self, busy: list[Sequence], flight: Flight) -> None:
        """Everyone who still decodes computes one token and samples the next."""
        batch = self._live.decoding
        if flight.preempted:
            flight.grown = [one for one in flight.grown if one.is_decoding]
        for sequence in flight.grown:
            flight.new_blocks += (sequence.seq_id, sequence.block_ids[-1])
        flight.decoding, flight.token_lists = batch.members, batch.token_lists
        flight.decoding_ids, flight.request_ids, flight.clients = batch.ids, batch.request_ids, batch.clients
        flight.stop_ids = batch.stop_ids
        batch.advance()
        for sequence in busy:
            if not sequence.is_decoding:
                continue  # it gave way to an older one
            if sequence.has_all_tokens:
                flight.ending.append(sequence)
                batch.leave(sequence)
            else:
                batch.expect(sequence)

    def _make_room(self, sequence: Sequence, num_tokens: int, flight: Flight) -> bool:
        """Preempt until `sequence` can have `num_tokens`; False if it has to wait, or gave way itself.

        Only those behind it give way, as the others have their place in this step. The oldest always gets
        what it needs; for any other a sequence that just came back is not preempted again.
        """
        live = self._live
        while (short := self._kv.num_missing_blocks(sequence, num_tokens) - self._kv.pool.num_free) > 0:
            is_oldest = sequence is live.running[0]
            behind = live.running[live.place_of(sequence) + 1 :]
            victim = choose_victim(self._kv, behind, short, spares_returned=not is_oldest)
            if victim is None:
                if not sequence.must_advance:
                    live.preempt(sequence, flight, "itself")
                return False
            live.preempt(victim, flight, "older")
        return True

    # ------------------------------------------------------------------ waiting sequences

    def _admit_waiting(self, flight: Flight, budget: StepBudget) -> None:
        """Start waiting sequences while the step has tokens and the pool has blocks for whole prompts.

        One that does not fit is passed over for smaller ones behind it, but not for ever: after a while, or
        when it ran before, nobody gets past it.
        """
        live = self._live
        if not len(live.waiting) or budget.num_admissions <= 0:
            flight.full = "sequences" if len(live.waiting) else ""
            return
        if self._stuck_at == (stuck := self._queue_state()):
            flight.full = "blocks"  # nobody fitted, and neither pool nor queue has changed since
            return
        promised, passed = self._kv.num_promised_blocks(live.running), list[Sequence]()
        walk = live.waiting.candidates(self._shares.is_held_back)
        while budget.num_tokens > 0 and budget.num_admissions > 0 and (sequence := next(walk, None)):
            if self._try_admit(sequence, promised, flight, budget):
                promised += self._kv.num_missing_blocks(sequence, len(sequence.token_ids))
                for one in passed:
                    one.num_overtaken += 1
                continue
            passed.append(sequence)
            flight.passed_over.append((sequence.request_id, sequence.waits_for))
            if sequence.num_preemptions or sequence.num_overtaken >= _MOST_OVERTAKEN:
                break
            if len(passed) >= _LOOK_AHEAD:
                break
        walk.close()
        if len(live.waiting):
            flight.full = (
                "tokens" if budget.num_tokens <= 0 else "sequences" if budget.num_admissions <= 0 else ""
            )
        if passed and all(one.tried_at == self._kv.pool.num_freed for one in passed) and not flight.added:
            self._stuck_at = stuck

    def _queue_state(self) -> tuple[int, int, int, int]:
        """Changes with whatever may let somebody in."""
        live = self._live
        return live.kv.pool.num_freed, len(live.waiting), live.waiting.num_added, live.num_preemptions

    def _try_admit(self, sequence: Sequence, promised: int, flight: Flight, budget: StepBudget) -> bool:
        """Start a waiting sequence unless step or pool have no room for it; `promised` blocks are taken."""
        pool, live = self._kv.pool, self._live
        if sequence.tried_at == pool.num_freed:
            return False  # it did not fit, and nothing became free since
        if sequence.request_id in flight.preempted:
            sequence.waits_for = "its turn, as its tenant had more than its share"
            return False  # and a token of it may be in flight
        prefix = self._kv.find_prefix(sequence)
        num_tokens = budget.next_chunk(sequence, len(prefix) * self._config.block_size)
        if num_tokens == 0:
            sequence.waits_for = "tokens or encoder of a step"
            return False
        if self._kv.num_needed_from_free(sequence, prefix) > live.num_spare_blocks(sequence, promised):
            sequence.tried_at, sequence.waits_for = pool.num_freed, "blocks"
            return False
        self._admit(sequence, prefix, num_tokens, flight, budget)
        return True

    def _admit(
        self, sequence: Sequence, prefix: Prefix, num_tokens: int, flight: Flight, budget: StepBudget
    ) -> None:
        self._live.start(sequence, prefix, flight.now)
        flight.added.append(sequence.to_message())
        self._plan_chunk(sequence, num_tokens, flight, budget, tuple(sequence.block_ids))
        budget.num_admissions -= 1

    # ------------------------------------------------------------------ both

    def _plan_chunk(
        self,
        sequence: Sequence,
        num_tokens: int,
        flight: Flight,
        budget: StepBudget,
        prefix: Iterable[BlockId] = (),
    ) -> None:
        """The caller has made sure that the blocks are there. The ranks do not know those of `prefix` yet.

        A sequence that comes back gets all of its blocks at once, so that nothing can stop it before it
        has made a token.
        """
        begin, needs_all = sequence.num_computed_tokens, sequence.must_advance
        end = begin + num_tokens
        if budget.take(sequence, begin, num_tokens):
            flight.encoding.append(sequence)
        samples = end == len(sequence.token_ids)
        new_block_ids = self._extend(sequence, len(sequence.token_ids) if needs_all else end)
        sequence.num_computed_tokens = end
        flight.fills.append(Fill(sequence, end, samples))
        flight.chunks.append(Chunk(sequence.seq_id, num_tokens, [*prefix, *new_block_ids], samples))
        flight.num_prefill_tokens += num_tokens if num_tokens > 1 else 0
        self._live.accounts.charge(sequence, end)

    def _extend(self, sequence: Sequence, num_tokens: int) -> list[BlockId]:
        new_block_ids = self._kv.try_extend(sequence, num_tokens)
        assert new_block_ids is not None
        if new_block_ids:
            self._live.accounts.of(sequence.tenant).num_blocks += len(new_block_ids)
        return new_block_ids

    def _let_join(self, flight: Flight) -> None:
        """Whoever computes the end of its prompt in this step decodes from the next one on."""
        for fill in flight.fills:
            if fill.samples and not fill.sequence.has_all_tokens:
                self._live.decoding.join(fill.sequence)


def _seniority(sequence: Sequence) -> int:
    return sequence.seniority

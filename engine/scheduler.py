"""Decides who computes how many tokens in each step, and what the sampled tokens mean.

No clock, no socket, no tensor: time and results come in as arguments. The concerns are files of their
own: blocks in kv_manager.py, the step's limits in budget.py and pacing.py, the queue in waiting.py, shares of
tenants in fairness.py, who gives way in preemption.py, ends in stopping.py.
Read `schedule` first, then `apply`.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

import msgspec

from engine.admission import Limits, make_sequence
from engine.block_pool import BlockId
from engine.budget import StepBudget
from engine.config import ServerConfig
from engine.deadlines import Deadlines
from engine.draft import StepDraft
from engine.errors import EngineError, RequestError
from engine.fairness import Accounts
from engine.kv_manager import KVManager, Prefix
from engine.messages import (
    AddRequest,
    Chunk,
    RequestOutput,
    SampledToken,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from engine.outbox import Client, Outbox
from engine.pacing import Pacing
from engine.preemption import choose_victim
from engine.prefix_cache import extend_keys
from engine.sequence import Sequence, Status
from engine.step_log import StepLog
from engine.stopping import FinishReason, finish_reason
from engine.waiting import WaitingQueue

_LOOK_AHEAD = 32  # waiting sequences that may be passed over in one step because they do not fit
_MOST_OVERTAKEN = 16  # later ones admitted before one that did not fit; then it is waited for


class Scheduler:
    """All live sequences, from `add` to their last output.

    `config` has max_model_len and max_num_batched_tokens settled (settle.py); one step is in flight at most.
    """

    def __init__(
        self,
        config: ServerConfig,
        num_blocks: int,
        eos_token_ids: Iterable[int],
        vocab_size: int,
        num_host_blocks: int = 0,
    ) -> None:
        self.config = config
        self.limits = Limits(
            config.max_model_len, num_blocks * config.block_size, vocab_size, frozenset(eos_token_ids)
        )
        self.kv = KVManager(num_blocks, config.block_size, config.enable_prefix_caching, num_host_blocks)
        self.accounts = Accounts(config.tenant_weights)
        self.waiting = WaitingQueue(config.max_waiting, self.accounts)
        self.running: list[Sequence] = []  # by seniority: blocks are taken from those behind
        self.pacing = Pacing(
            config.target_itl_ms / 1000, config.max_prefill_tokens_per_step or config.max_num_batched_tokens
        )
        self.log = StepLog()
        self.num_preemptions = 0
        self.num_tokens_in_step = 0  # computed by the plan made last
        self._by_request: dict[str, Sequence] = {}  # everything live
        self._by_seq_id: dict[int, Sequence] = {}  # everything the ranks know and we still want
        self._filling: list[Sequence] = []  # the step in flight computes a chunk of their prompts
        self._crossing: list[Sequence] = []  # the step in flight is the first in a new block of theirs
        self._dropped: list[int] = []  # the ranks still know them, the next plan says to forget
        self._deadlines = Deadlines()
        self._num_admitted = 0
        self._num_prefill_tokens = 0  # of the step in flight
        self._encoding: list[Sequence] = []  # the step in flight encodes media of theirs
        self._outbox = Outbox()
        self._headroom = num_blocks // 100  # blocks left to the running when another is admitted
        self._num_sequences = 0
        self._num_steps = 0
        self._stuck_at: tuple[int, ...] = ()  # `_queue_state` when nobody who was tried had blocks
        self._has_finished = False  # someone in `running` is
        self._samples_in_flight: int | None = None  # None: no step in flight

    # ------------------------------------------------------------------ requests come and go

    def add(self, client: Client, request: AddRequest, now: float) -> bool:
        """Queue a request. Whatever is wrong with it ends it alone: returns False, and an output says why."""
        try:
            self._queue(client, request, now)
        except RequestError as error:
            self.refuse(client, request, error.message, error.status)
            return False
        except Exception as error:
            self.refuse(client, request, f"the engine could not take this request: {error!r}", 500)
            return False
        return True

    def refuse(self, client: Client, request: AddRequest, message: str, status: int) -> None:
        """Answer a request that is not taken."""
        self._outbox.outputs[client].append(_error_output(request.request_id, message, status))
        self._outbox.refused.append(status)

    def abort(self, request_id: str) -> None:
        """Forget a request now; unknown and finished ones are ignored."""
        if sequence := self._by_request.get(request_id):
            self._finish(sequence, "abort", RequestOutput(request_id, finish_reason="abort"))
            self._forget_finished()

    def abort_client(self, client: Client) -> int:
        """An api process left and nobody reads its outputs any more; returns how many requests it had."""
        theirs = [one for one in self._by_request.values() if one.client == client]
        for sequence in theirs:
            self.abort(sequence.request_id)
        return len(theirs)

    def fail_all(self, message: str, status: int) -> None:
        """End every request with an error, as the ranks are gone."""
        for request_id, sequence in list(self._by_request.items()):
            self._finish(sequence, "error", _error_output(request_id, message, status))
        self._forget_finished()

    # ------------------------------------------------------------------ a step

    def schedule(self, now: float) -> StepPlan | None:
        """Choose how many tokens each sequence computes in the next step; None when nothing is to do.

        A sequence needs `num_tokens - num_computed_tokens` more. Prefill, a chunk of it and decode
        differ only in how large that number is. Running sequences come first, then waiting ones.
        """
        self._end_overdue(now)
        draft, budget = StepDraft(now), self._make_budget()
        self._continue_running(draft, budget)
        if not draft.preempted:
            self._admit_waiting(draft, budget)
        if not draft.chunks and not self._dropped:
            return None
        self.num_tokens_in_step = self.config.max_num_batched_tokens - budget.num_tokens
        self.log.add(
            draft.record(self._num_steps + 1, self.num_tokens_in_step, len(self.running), len(self.waiting))
        )
        return self._seal(draft)

    def probe(self) -> StepPlan:
        """A plan without work, to see whether every rank answers."""
        return self._seal(StepDraft(0.0))

    def apply(self, result: StepResult, now: float) -> None:
        """Append the sampled tokens of the step in flight, end what has ended, free its blocks."""
        if self._samples_in_flight is None or result.step != self._num_steps:
            raise EngineError(f"the ranks answered step {result.step}, expected step {self._num_steps}")
        if len(result.tokens) != self._samples_in_flight:
            raise EngineError(
                f"step {result.step} returned {len(result.tokens)} tokens, expected {self._samples_in_flight}"
            )
        self._samples_in_flight = None
        self.log.finish(result, now)
        self.pacing.observe(result.compute_seconds, self._num_prefill_tokens)
        self.kv.swap.observe(result.num_swapped_blocks, result.swap_seconds)
        self.kv.recompute_seconds = self.pacing.token_seconds * self.config.block_size
        for encoded in self._encoding:
            encoded.encode_seconds += result.encode_seconds
        self._remember_blocks()
        self._outbox.num_generated_tokens += len(result.tokens)
        for sampled in result.tokens:
            # A sequence aborted during the step is not here any more; its token is nobody's.
            sequence = self._by_seq_id.get(sampled.seq_id)
            if sequence is not None:
                self._append(sequence, sampled, now)
        self._forget_finished()

    def tidy(self) -> None:
        """What can be done while the ranks compute, so that they need not wait for it later."""
        if not self.kv.caches_prefixes:
            return
        for sequence in self._crossing:
            if sequence.is_running:  # all but the token of this step was computed by earlier ones
                self.kv.remember(sequence, sequence.num_computed_tokens - 1)
        self._crossing.clear()
        for sequence in self._filling:
            extend_keys(sequence, self.config.block_size)

    def take_outbox(self) -> Outbox:
        """Everything to publish since the last call."""
        outbox, self._outbox = self._outbox, Outbox()
        return outbox

    # ------------------------------------------------------------------ how it stands

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def has_step_in_flight(self) -> bool:
        return self._samples_in_flight is not None

    def recount(self) -> None:
        """Raise EngineError unless every block has exactly its owners and every list the right members."""
        self.kv.recount(self.running, self.waiting)
        listed = {sequence.request_id: sequence for sequence in (*self.running, *self.waiting)}
        if listed != self._by_request:
            raise EngineError("the live requests are not those running and waiting")
        if {sequence.seq_id for sequence in self.running} != set(self._by_seq_id):
            raise EngineError("the sequences the ranks know are not those running")
        if any(not one.is_running for one in self.running) or any(not one.is_waiting for one in self.waiting):
            raise EngineError("a sequence's status contradicts the list it is in")

    # ------------------------------------------------------------------ planning

    def _make_budget(self) -> StepBudget:
        """Prompts are held back only where answers are under way."""
        decodes = any(one.first_token for one in self.running)
        at_most = self.pacing.num_prefill_tokens if decodes else self.config.max_num_batched_tokens
        return StepBudget.from_config(self.config, len(self.running), at_most)

    def _continue_running(self, draft: StepDraft, budget: StepBudget) -> None:
        """Running sequences compute their next tokens, by seniority, with a token kept for everyone behind.

        The admission keeps len(running) within the budget, so there is a token for everyone.
        """
        running, index = self.running, 0
        while index < len(running):
            sequence = running[index]
            computed = sequence.num_computed_tokens
            index += 1
            if computed + 1 == len(sequence.token_ids) and computed < sequence.num_slots:
                # The usual case, kept short: one token, and room in the last block.
                sequence.num_computed_tokens = computed + 1
                draft.chunks.append(sequence.decode_chunk)
                draft.num_sampling += 1
                budget.num_tokens -= 1
                continue
            num_tokens = budget.next_chunk(sequence, computed, kept_back=len(running) - index)
            if num_tokens == 0:
                continue  # its next image, or its prompt, is for a later step
            if self._make_room(sequence, computed + num_tokens, index, draft):
                self._plan_chunk(sequence, num_tokens, draft, budget)
            elif not sequence.is_running:
                index -= 1

    def _make_room(self, sequence: Sequence, num_tokens: int, behind: int, draft: StepDraft) -> bool:
        """Preempt until `sequence` can have `num_tokens`; False if it has to wait, or gave way itself.

        Only those from index `behind` on give way, as the others have their place in this step. The oldest
        always gets what it needs; for any other a sequence that just came back is not preempted again.
        """
        while (short := self.kv.num_missing_blocks(sequence, num_tokens) - self.kv.pool.num_free) > 0:
            is_oldest = sequence is self.running[0]
            victim = choose_victim(self.kv, self.running[behind:], short, spares_returned=not is_oldest)
            if victim is None:
                if not sequence.must_advance:
                    self._preempt(sequence, draft, "itself")
                return False
            self._preempt(victim, draft, "older")
        return True

    def _preempt(self, sequence: Sequence, draft: StepDraft, reason: str) -> None:
        """Take all blocks of a sequence; its tokens stay, and what is lost is computed again later."""
        self.running.remove(sequence)
        self._take_from_ranks(sequence)
        sequence.status = Status.WAITING
        sequence.num_computed_tokens = 0
        sequence.num_tokens_at_preemption = sequence.num_tokens
        sequence.num_preemptions += 1
        sequence.preempted_at = draft.now
        self.num_preemptions += 1
        self._outbox.preemptions[reason] += 1
        self.waiting.put_back(sequence)
        draft.preempted.append(sequence.request_id)

    def _admit_waiting(self, draft: StepDraft, budget: StepBudget) -> None:
        """Start waiting sequences while the step has tokens and the pool has blocks for whole prompts.

        One that does not fit is passed over for smaller ones behind it, but not for ever: after a while, or
        when it ran before, nobody gets past it.
        """
        if not len(self.waiting) or budget.num_admissions <= 0:
            draft.full = "sequences" if len(self.waiting) else ""
            return
        if self._stuck_at == (stuck := self._queue_state()):
            draft.full = "blocks"  # nobody fitted, and neither pool nor queue has changed since
            return
        promised, passed = self.kv.num_promised_blocks(self.running), list[Sequence]()
        walk = self.waiting.candidates()
        while budget.num_tokens > 0 and budget.num_admissions > 0 and (sequence := next(walk, None)):
            if self._try_admit(sequence, promised, draft, budget):
                promised += self.kv.num_missing_blocks(sequence, sequence.num_tokens)
                for one in passed:
                    one.num_overtaken += 1
                continue
            passed.append(sequence)
            draft.passed_over.append((sequence.request_id, sequence.waits_for))
            if sequence.num_preemptions or sequence.num_overtaken >= _MOST_OVERTAKEN:
                break
            if len(passed) >= _LOOK_AHEAD:
                break
        walk.close()
        if len(self.waiting):
            draft.full = (
                "tokens" if budget.num_tokens <= 0 else "sequences" if budget.num_admissions <= 0 else ""
            )
        if passed and all(one.tried_at == self.kv.pool.num_freed for one in passed) and not draft.added:
            self._stuck_at = stuck

    def _queue_state(self) -> tuple[int, int, int, int]:
        """Changes with whatever may let somebody in."""
        return self.kv.pool.num_freed, len(self.waiting), self._num_sequences, self.num_preemptions

    def _try_admit(self, sequence: Sequence, promised: int, draft: StepDraft, budget: StepBudget) -> bool:
        """Start a waiting sequence unless step or pool have no room for it; `promised` blocks are taken."""
        pool = self.kv.pool
        if sequence.tried_at == pool.num_freed:
            return False  # it did not fit, and nothing became free since
        prefix = self.kv.find_prefix(sequence)
        num_tokens = budget.next_chunk(sequence, len(prefix) * self.config.block_size)
        if num_tokens == 0:
            sequence.waits_for = "tokens or encoder of a step"
            return False
        reserve = self._headroom if self.running else 0
        if sequence.num_preemptions:
            reserve += len(self.running)  # else it would soon have to go again
        if self.kv.num_needed_from_free(sequence, prefix) > pool.num_free - promised - reserve:
            sequence.tried_at, sequence.waits_for = pool.num_freed, "blocks"
            return False
        self._admit(sequence, prefix, draft)
        self._plan_chunk(sequence, num_tokens, draft, budget, tuple(sequence.block_ids))
        budget.num_admissions -= 1
        return True

    def _admit(self, sequence: Sequence, prefix: Prefix, draft: StepDraft) -> None:
        self.waiting.drop(sequence)
        self.kv.begin_with(sequence, prefix)
        sequence.num_tokens_at_admission = sequence.num_computed_tokens
        if not sequence.first_scheduled:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self._num_admitted += 1
            sequence.seniority = self._num_admitted
            self.log.name(sequence.seq_id, sequence.request_id)
        self.accounts.admit(sequence)
        insort(self.running, sequence, key=_seniority)
        self._by_seq_id[sequence.seq_id] = sequence
        sequence.status = Status.RUNNING
        sequence.first_scheduled = sequence.first_scheduled or draft.now
        if sequence.num_preemptions:
            sequence.preempted_seconds += draft.now - sequence.preempted_at
        draft.added.append(sequence.to_message())

    def _plan_chunk(
        self,
        sequence: Sequence,
        num_tokens: int,
        draft: StepDraft,
        budget: StepBudget,
        prefix: Iterable[BlockId] = (),
    ) -> None:
        """The caller has made sure that the blocks are there. The ranks do not know those of `prefix` yet.

        A sequence that comes back gets all of its blocks at once, so that nothing can stop it before it
        has made a token.
        """
        if budget.take(sequence, sequence.num_computed_tokens, num_tokens):
            draft.encoding.append(sequence)
        sequence.num_computed_tokens += num_tokens
        needs = sequence.num_tokens if sequence.must_advance else sequence.num_computed_tokens
        new_block_ids = self.kv.try_extend(sequence, needs)
        assert new_block_ids is not None
        samples = sequence.num_computed_tokens == sequence.num_tokens
        draft.chunks.append(Chunk(sequence.seq_id, num_tokens, [*prefix, *new_block_ids], samples))
        (self._filling if num_tokens > 1 else self._crossing).append(sequence)
        draft.num_sampling += samples
        draft.num_prefill_tokens += num_tokens if num_tokens > 1 else 0
        self.accounts.charge(sequence, sequence.num_computed_tokens)

    def _remember_blocks(self) -> None:
        """The step has been computed, and others may use what it filled."""
        for sequence in self._filling:
            if sequence.is_running:
                self.kv.remember(sequence, sequence.num_computed_tokens)
        self._filling.clear()
        self._crossing.clear()

    def _seal(self, draft: StepDraft) -> StepPlan:
        assert not self.has_step_in_flight
        self._num_steps += 1
        self._samples_in_flight = draft.num_sampling
        self._num_prefill_tokens = draft.num_prefill_tokens
        self._encoding = draft.encoding
        dropped, self._dropped = self._dropped, []
        return StepPlan(self._num_steps, draft.chunks, draft.added, dropped, *self.kv.swap.take_copies())

    # ------------------------------------------------------------------ beginnings and ends

    def _queue(self, client: Client, request: AddRequest, now: float) -> None:
        if request.request_id in self._by_request:
            raise RequestError(f"request id {request.request_id!r} is already in use", status=500)
        sequence = make_sequence(self._num_sequences, client, request, self.limits, now)
        if not self.waiting.try_add(sequence):
            raise RequestError(
                f"{len(self.waiting)} requests are waiting already; try again later",
                status=429,
                code="queue_full",
            )
        if self.kv.caches_prefixes:
            extend_keys(sequence, self.config.block_size)  # now rather than when the ranks wait for a plan
        self._num_sequences += 1
        self.accounts.enter(sequence)
        self._deadlines.watch(sequence)
        self._by_request[sequence.request_id] = sequence

    def _append(self, sequence: Sequence, sampled: SampledToken, now: float) -> None:
        """One sampled token becomes one output, the last one if it ends the sequence."""
        token_id, reason = sampled.token_id, None
        if token_id in sequence.stop_token_ids or len(sequence.token_ids) + 1 >= sequence.max_num_tokens:
            reason = finish_reason(sequence, token_id)  # asked only when the usual case is excluded
        if reason == "stop":
            output = RequestOutput(sequence.request_id, finish_reason=reason, stop_token_id=token_id)
        else:
            sequence.token_ids.append(token_id)
            logprobs = [sampled.logprobs] if sampled.logprobs else _NO_LOGPROBS
            output = RequestOutput(sequence.request_id, [token_id], logprobs, reason)
        if not sequence.first_token:
            output = self._begin_output(sequence, output, now)
        if reason:
            sequence.last_token = now
            self._finish(sequence, reason, msgspec.structs.replace(output, timings=sequence.timings))
        else:
            self._outbox.outputs[sequence.client].append(output)

    def _begin_output(self, sequence: Sequence, output: RequestOutput, now: float) -> RequestOutput:
        """The first output also tells how the request got in."""
        sequence.first_token = now
        self._outbox.started.append(sequence)
        return msgspec.structs.replace(
            output,
            num_cached_tokens=sequence.num_cached_tokens,
            queue_seconds=sequence.first_scheduled - sequence.arrival,
        )

    def _finish(self, sequence: Sequence, reason: FinishReason, last_output: RequestOutput) -> None:
        """End a live sequence; the caller calls `_forget_finished` when it is done ending."""
        if sequence.is_waiting:
            self.waiting.drop(sequence)
        else:
            self._take_from_ranks(sequence)
        self.accounts.leave(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        del self._by_request[sequence.request_id]
        self._outbox.outputs[sequence.client].append(last_output)
        self._outbox.finished.append(sequence)
        self._has_finished = True

    def _end_overdue(self, now: float) -> None:
        """An answer that is under way ends as if it had reached its length; without one it is an error."""
        for sequence in self._deadlines.take_overdue(now):
            if sequence.first_token:
                sequence.last_token = now
                output = RequestOutput(sequence.request_id, finish_reason="length", timings=sequence.timings)
                self._finish(sequence, "length", output)
            else:
                after = sequence.deadline - sequence.arrival
                message = f"the request's timeout of {after:g} s passed before its first token"
                self._finish(sequence, "error", _error_output(sequence.request_id, message, 504))
        self._forget_finished()

    def _take_from_ranks(self, sequence: Sequence) -> None:
        """A step in flight may still write into the blocks: harmless, as later steps come after it."""
        self.kv.release(sequence, is_computed=not self.has_step_in_flight)
        del self._by_seq_id[sequence.seq_id]
        self._dropped.append(sequence.seq_id)

    def _forget_finished(self) -> None:
        if self._has_finished:
            self.running = [sequence for sequence in self.running if sequence.is_running]
            self._has_finished = False


def _seniority(sequence: Sequence) -> int:
    return sequence.seniority


_NO_LOGPROBS: list[TokenLogprobs] = []


def _error_output(request_id: str, message: str, status: int) -> RequestOutput:
    return RequestOutput(request_id, finish_reason="error", error=message, error_status=status)

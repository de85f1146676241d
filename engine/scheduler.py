"""Decides who computes how many tokens in each step, and what the sampled tokens mean.

No clock, no socket, no tensor: time and results come in as arguments. Here is what the outside calls; a
step is made in planning.py and its result taken in by applying.py, both over the books of live.py. The
other concerns are files of their own: blocks in kv_manager.py, limits of a step in budget.py and pacing.py,
the queue in waiting.py, shares of tenants in fairness.py, who gives way in preemption.py, and ends in
stopping.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.admission import Limits, make_sequence
from engine.applying import Applier
from engine.config import ServerConfig
from engine.errors import RequestError
from engine.flight import Flight
from engine.live import MOST_FLIGHTS, LiveSequences
from engine.messages import AddRequest, RequestOutput, StepPlan, StepResult
from engine.outbox import Client, Outbox
from engine.pacing import Pacing
from engine.planning import Planner
from engine.sequence import Sequence


class Scheduler:
    """All live sequences, from `add` to their last output.

    `config` has max_model_len and max_num_batched_tokens settled (settle.py).

    Steps may overlap: `schedule` may be called while the result of the plan before is not there yet, at most
    two plans at once. The calls go

        schedule n, [schedule n+1, apply n, schedule n+2, apply n+1, ...]     one step late
        schedule n, apply n, schedule n+1, apply n+1, ...                     one after the other

    in any mixture; results come in the order of the plans. A token that step n samples is computed by step
    n+1 all the same: the ranks know its value. A sequence that turns out finished when n is applied has had
    a slot of n+1 for nothing, and what n+1 says of it is dropped; ends by length are known beforehand and
    cost nothing. Blocks change hands at once, as the ranks run plans in order and whoever gets a block writes
    to it later; content is shared only once the step that wrote it was applied.
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
        self.pacing = Pacing(
            config.target_itl_ms / 1000, config.max_prefill_tokens_per_step or config.max_num_batched_tokens
        )
        self._live = LiveSequences(config, num_blocks, num_host_blocks)
        self._planner = Planner(config, self._live, self.pacing)
        self._applier = Applier(self._live, self.pacing)
        self.kv, self.waiting, self.accounts = self._live.kv, self._live.waiting, self._live.accounts
        self.log = self._live.log
        self.num_tokens_in_step = 0  # computed by the plan made last
        self._num_sequences = self._num_refused = 0
        self._num_steps = 0

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
        outbox = self._live.outbox
        outbox.add(client, _error_output(request.request_id, message, status))
        outbox.refused.append(status)
        self._num_refused += 1

    def abort(self, request_id: str) -> None:
        """Forget a request now; unknown and finished ones are ignored."""
        if sequence := self._live.by_request.get(request_id):
            self._live.finish(sequence, "abort", RequestOutput(request_id, finish_reason="abort"))

    def abort_client(self, client: Client) -> int:
        """An api process left and nobody reads its outputs any more; returns how many requests it had."""
        theirs = [one for one in self._live.by_request.values() if one.client == client]
        for sequence in theirs:
            self.abort(sequence.request_id)
        return len(theirs)

    def fail_all(self, message: str, status: int) -> None:
        """End every request with an error, as the ranks are gone."""
        for request_id, sequence in list(self._live.by_request.items()):
            self._live.finish(sequence, "error", _error_output(request_id, message, status))

    # ------------------------------------------------------------------ a step

    def schedule(self, now: float) -> StepPlan | None:
        """Choose how many tokens each sequence computes in the next step; None when nothing is to do."""
        assert len(self._live.flights) < MOST_FLIGHTS, "apply a result first"
        self._end_overdue(now)
        flight = self._planner.plan(now)
        if flight.is_empty and not self._live.dropped:
            return None
        self._number(flight)
        self._live.log.add(flight.to_record(self.num_running, self.num_waiting))
        return self._send(flight)

    def probe(self) -> StepPlan:
        """A plan without work, to see whether every rank answers."""
        flight = Flight(0.0)
        self._number(flight)
        return self._send(flight)

    def apply(self, result: StepResult, now: float) -> None:
        """Take in the result of the oldest plan that has none: append tokens, end what has ended."""
        self._applier.apply(result, now)

    def tidy(self) -> None:
        """What can be done while the ranks compute, so that they need not wait for it later."""
        self._applier.tidy()

    def take_outbox(self) -> Outbox:
        """Everything to publish since the last call."""
        outbox, self._live.outbox = self._live.outbox, Outbox()
        return outbox

    def _number(self, flight: Flight) -> None:
        self._num_steps += 1
        flight.step = self._num_steps

    def _send(self, flight: Flight) -> StepPlan:
        live = self._live
        self.num_tokens_in_step = flight.num_tokens
        dropped, live.dropped = live.dropped, []
        live.flights.append(flight)
        return flight.to_plan(dropped, *self.kv.swap.take_copies())

    # ------------------------------------------------------------------ how it stands

    @property
    def running(self) -> list[Sequence]:
        """By seniority; not to be changed."""
        return self._live.running

    @property
    def num_running(self) -> int:
        return len(self._live.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_to_go_on(self) -> int:
        """Of the waiting ones those that were preempted; counted anew at every call."""
        return sum(1 for one in self.waiting if one.num_preemptions)

    @property
    def num_requests(self) -> int:
        """That came in all this time, refused ones included."""
        return self._num_sequences + self._num_refused

    @property
    def num_preemptions(self) -> int:
        return self._live.num_preemptions

    @property
    def num_steps_in_flight(self) -> int:
        """Planned and not applied: 0, 1 or 2."""
        return len(self._live.flights)

    def recount(self) -> None:
        """Raise EngineError unless every block has exactly its owners and every list the right members."""
        self._live.recount()

    # ------------------------------------------------------------------ beginnings and ends

    def _queue(self, client: Client, request: AddRequest, now: float) -> None:
        if request.request_id in self._live.by_request:
            raise RequestError(f"request id {request.request_id!r} is already in use", status=500)
        sequence = make_sequence(self._num_sequences, client, request, self.limits, now)
        if not self._live.try_enter(sequence):
            raise RequestError(
                f"{len(self.waiting)} requests are waiting already; try again later",
                status=429,
                code="queue_full",
            )
        self._num_sequences += 1

    def _end_overdue(self, now: float) -> None:
        """An answer that is under way ends as if it had reached its length; without one it is an error."""
        for sequence in self._live.deadlines.take_overdue(now):
            if sequence.first_token:
                sequence.last_token = now
                output = RequestOutput(sequence.request_id, finish_reason="length", timings=sequence.timings)
                self._live.finish(sequence, "length", output)
            else:
                after = sequence.deadline - sequence.arrival
                message = f"the request's timeout of {after:g} s passed before its first token"
                self._live.finish(sequence, "error", _error_output(sequence.request_id, message, 504))


def _error_output(request_id: str, message: str, status: int) -> RequestOutput:
    return RequestOutput(request_id, finish_reason="error", error=message, error_status=status)

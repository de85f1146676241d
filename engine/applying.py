"""What a step's result means: tokens are appended, ends noticed, full blocks made known to the prefix cache.

The step was planned in planning.py, perhaps with another one behind it by now; flight.py holds what is
needed to understand the answer. When a sequence ends is in stopping.py.
"""

from __future__ import annotations

from array import array
from collections import deque

import msgspec

from engine.errors import EngineError
from engine.flight import Flight
from engine.live import LiveSequences
from engine.messages import RequestOutput, StepResult, TokenLogprobs
from engine.outbox import Decoded
from engine.pacing import Pacing
from engine.prefix_cache import extend_keys
from engine.sequence import Sequence
from engine.stopping import FinishReason, finish_reason

_NO_LOGPROBS: list[TokenLogprobs] = []


class Applier:
    """Takes one result after the other, each for the oldest flight."""

    def __init__(self, live: LiveSequences, pacing: Pacing) -> None:
        self._live, self._pacing = live, pacing
        self._kv = live.kv
        self._grown: list[Sequence] = []  # a block of theirs was full before a step that was applied

    def apply(self, result: StepResult, now: float) -> None:
        """Raises EngineError, changing nothing, when the result is not the oldest flight's."""
        tokens = array("i", result.token_ids)
        flight = self._take_flight(result, len(tokens))
        self._observe(flight, result, now)
        num_decoding = len(flight.decoding)
        self._append_decoded(flight, tokens[:num_decoding].tolist(), result.logprobs, now)
        row = num_decoding
        for sequence, end, samples in flight.fills:
            if sequence.is_running:
                sequence.num_filled_tokens = end
                self._kv.remember(sequence, end)
            if samples:
                self._append_first(sequence, tokens[row], result.logprobs.get(row), now)
                row += 1

    def tidy(self) -> None:
        """Make known the blocks of generated tokens, and the keys that the steps in flight will need."""
        if not self._kv.caches_prefixes:
            return
        for sequence in self._grown:
            if sequence.is_running:
                self._kv.remember(sequence, sequence.num_applied_tokens)
        self._grown.clear()
        for flight in self._live.flights:
            for fill in flight.fills:
                extend_keys(fill.sequence, self._kv.block_size)

    def _take_flight(self, result: StepResult, num_tokens: int) -> Flight:
        flights = self._live.flights
        if not flights or result.step != flights[0].step:
            expected = f"step {flights[0].step}" if flights else "nothing"
            raise EngineError(f"the ranks answered step {result.step}, expected {expected}")
        if num_tokens != flights[0].num_samples:
            raise EngineError(
                f"step {result.step} returned {num_tokens} tokens, expected {flights[0].num_samples}"
            )
        return flights.popleft()

    def _observe(self, flight: Flight, result: StepResult, now: float) -> None:
        """What the step took."""
        self._live.log.finish(result, now)
        self._pacing.observe(result.compute_seconds, flight.num_prefill_tokens)
        self._kv.swap.observe(result.num_swapped_blocks, result.swap_seconds)
        self._kv.recompute_seconds = self._pacing.token_seconds * self._kv.block_size
        for encoded in flight.encoding:
            encoded.encode_seconds += result.encode_seconds
        self._live.outbox.num_generated_tokens += flight.num_samples
        self._grown += flight.grown

    # ------------------------------------------------------------------ decodes: many, all alike

    def _append_decoded(
        self, flight: Flight, tokens: list[int], logprobs: dict[int, TokenLogprobs], now: float
    ) -> None:
        """One token each. Who ends with it is found first, as a stop token does not join the output."""
        sequences, token_lists, request_ids = flight.decoding, flight.token_lists, flight.request_ids
        if flight.has_gaps:  # someone was aborted or has ended: that token is nobody's
            rows = [row for row, one in enumerate(sequences) if not one.is_finished]
            sequences, tokens = [sequences[row] for row in rows], [tokens[row] for row in rows]
            token_lists, request_ids = [token_lists[row] for row in rows], [request_ids[row] for row in rows]
            logprobs = {new: logprobs[row] for new, row in enumerate(rows) if row in logprobs}
        if not sequences:
            return
        ended = self._find_ended(flight, sequences, tokens)
        deque(map(list.append, token_lists, tokens), maxlen=0)  # a loop in C, over lists alone
        decoded = Decoded(sequences, request_ids, flight.clients, tokens, logprobs, frozenset(ended))
        self._live.outbox.add_decoded(decoded)
        for row, reason in ended.items():
            self._end(sequences[row], tokens[row], reason, logprobs.get(row), now)

    def _find_ended(
        self, flight: Flight, sequences: list[Sequence], tokens: list[int]
    ) -> dict[int, FinishReason]:
        """Rows of those for whom it was the last token, and why; asked only where it can be."""
        rows: set[int] = set()
        if not flight.stop_ids.isdisjoint(tokens):
            rows.update(row for row, token in enumerate(tokens) if token in flight.stop_ids)
        if flight.ending:
            ending = set(flight.ending)
            rows.update(row for row, one in enumerate(sequences) if one in ending)
        reasons = {row: finish_reason(sequences[row], tokens[row]) for row in sorted(rows)}
        return {row: reason for row, reason in reasons.items() if reason}

    def _end(
        self,
        sequence: Sequence,
        token: int,
        reason: FinishReason,
        logprobs: TokenLogprobs | None,
        now: float,
    ) -> None:
        """The token just appended is the last, or, if it is a stop token, no part of the output."""
        if reason == "stop":
            sequence.token_ids.pop()
            sequence.num_filled_tokens, sequence.is_filled = len(sequence.token_ids), False
        self._finish(sequence, _output_of(sequence, token, reason, logprobs), reason, now)

    # ------------------------------------------------------------------ first tokens

    def _append_first(
        self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None, now: float
    ) -> None:
        """The token behind a prompt, or behind what a preempted sequence had to compute again."""
        if sequence.is_finished:
            return
        reason = finish_reason(sequence, token)
        if reason != "stop":
            sequence.token_ids.append(token)
            sequence.is_filled = sequence.is_running
        output = _output_of(sequence, token, reason, logprobs)
        if not sequence.first_token:
            sequence.first_token = now
            self._live.outbox.started.append(sequence)
            output = msgspec.structs.replace(
                output,
                num_cached_tokens=sequence.num_cached_tokens,
                queue_seconds=sequence.first_scheduled - sequence.arrival,
            )
        if reason:
            self._finish(sequence, output, reason, now)
        else:
            self._live.outbox.add(sequence.client, output)

    def _finish(self, sequence: Sequence, output: RequestOutput, reason: FinishReason, now: float) -> None:
        sequence.last_token = now
        self._live.finish(sequence, reason, msgspec.structs.replace(output, timings=sequence.timings))


def _output_of(
    sequence: Sequence, token: int, reason: FinishReason | None, logprobs: TokenLogprobs | None
) -> RequestOutput:
    if reason == "stop":
        return RequestOutput(sequence.request_id, finish_reason=reason, stop_token_id=token)
    return RequestOutput(sequence.request_id, [token], [logprobs] if logprobs else _NO_LOGPROBS, reason)

"""A step that was issued, until its tokens are on the host.

On a GPU the next step may be issued before that. A sequence then ends in a token that only the device knows:
UNKNOWN in the mirror, and `LiveSequence.sample_row` says which row of the last samples it is. `settle` writes
the tokens into the mirror once they have come.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.errors import EngineError
from engine.messages import StepResult, TokenLogprobs
from workers.batch import HostBatch
from workers.device.base import Download
from workers.media_features import EncodeStats
from workers.sequences import UNKNOWN, LiveSequence
from workers.swap import SwapStats


@dataclass(slots=True)
class Details:
    """Log-probabilities of a step's rows, on their way to the host."""

    logprobs: Download  # [S] of the chosen tokens
    top_ids: Download  # [S, n] of the best, best first
    top_logprobs: Download  # [S, n]

    def is_done(self) -> bool:
        return self.logprobs.is_done() and self.top_ids.is_done() and self.top_logprobs.is_done()

    def of(self, live: Sequence[LiveSequence]) -> dict[int, TokenLogprobs]:
        """By row, for those that asked."""
        chosen, ids, best = (one.result() for one in (self.logprobs, self.top_ids, self.top_logprobs))
        counts = [sequence.sampling.num_logprobs for sequence in live]
        return {
            row: TokenLogprobs(float(chosen[row]), ids[row, :count].tolist(), best[row, :count].tolist())
            for row, count in enumerate(counts)
            if count >= 0
        }


@dataclass(slots=True)
class RunningStep:
    """One rank's work on a plan. All of its methods belong to the thread that issues steps."""

    step: int
    began: float  # time.perf_counter() when it was issued
    encoding: EncodeStats = field(default_factory=EncodeStats)
    swapped: SwapStats = field(default_factory=SwapStats)
    _ended: float = 0.0
    _sampled: Sequence[LiveSequence] = ()  # one per row
    _places: list[int] = field(default_factory=list)  # index of the new token in each of them
    _token_ids: Download | None = None
    _details: Details | None = None
    _ids: np.ndarray | None = None  # [S] int32, once settled

    def expect(self, sampled: Sequence[LiveSequence], token_ids: Download, details: Details | None) -> None:
        """Each of `sampled` has one more token, on its way: [S] int32, -1 where the logits are no numbers.

        `details` are rank 0's, where somebody asked for log-probabilities.
        """
        self._sampled, self._token_ids, self._details = sampled, token_ids, details
        for row, sequence in enumerate(sampled):
            self._places.append(len(sequence.tokens))
            sequence.tokens.append(UNKNOWN)
            sequence.sample_row = row

    def is_done(self) -> bool:
        """Whether `settle` and `result` return at once."""
        if self._ids is not None or self._token_ids is None:
            return True
        return self._token_ids.is_done() and (self._details is None or self._details.is_done())

    def settle(self) -> np.ndarray:
        """The token ids, which the mirror knows from now on. Waits for the device."""
        if self._ids is None:
            self._ids = np.empty(0, np.int32) if self._token_ids is None else self._token_ids.result()
            self._ended = time.perf_counter()
            for sequence, place, token_id in zip(
                self._sampled, self._places, self._ids.tolist(), strict=True
            ):
                sequence.learn(place, token_id)
        return self._ids

    def result(self) -> StepResult:
        """To be asked for once. Raises EngineError when a row's logits were no numbers."""
        ids = self.settle()
        if min(ids.tolist(), default=0) < 0:
            seq_id = self._sampled[int(np.argmax(ids < 0))].seq_id
            raise EngineError(f"the logits of sequence {seq_id} are not numbers; are the weights damaged?")
        return StepResult(
            step=self.step,
            token_ids=ids.tobytes(),
            logprobs=self._details.of(self._sampled) if self._details else {},
            compute_seconds=self._ended - self.began - self.encoding.seconds - self.swapped.seconds,
            encode_seconds=self.encoding.seconds,
            num_encoded_patches=self.encoding.num_patches,
            num_cached_patches=self.encoding.num_cached_patches,
            num_swapped_blocks=self.swapped.num_blocks,
            swap_seconds=self.swapped.seconds,
        )


def sample_sources(host: HostBatch, live: Sequence[LiveSequence]) -> np.ndarray | None:
    """[M] int32: for each token that only the device knows its row of the last samples, else -1.

    None when the mirror knows all. `live` are the sequences of the batch, in its order.
    """
    if not (host.token_ids == UNKNOWN).any():
        return None
    sources = np.full(len(host.token_ids), -1, np.int32)
    sources[host.query_starts[1:] - 1] = [sequence.sample_row for sequence in live]
    sources[host.token_ids != UNKNOWN] = -1
    return sources

"""When a sequence is finished: an end token, or no room for another token.

Stop strings are found by the api, which has the text; it then aborts the request.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from engine.messages import SamplingParams
from engine.sequence import Sequence

FinishReason = Literal["stop", "length", "abort", "error"]


def stop_token_ids(sampling: SamplingParams, eos_token_ids: Iterable[int]) -> frozenset[int]:
    """Tokens that end a sequence: the request's own, and the model's unless the request ignores them."""
    own = frozenset(sampling.stop_token_ids)
    return own if sampling.ignore_eos else own.union(eos_token_ids)


def finish_reason_before(sequence: Sequence, token_id: int) -> FinishReason | None:
    """ "stop" if `token_id`, not yet appended, ends the sequence instead of joining its output.

    The ranks mask end tokens before `min_tokens`, so one that comes all the same is an ordinary token.
    """
    if token_id in sequence.stop_token_ids and sequence.num_output_tokens >= sequence.sampling.min_tokens:
        return "stop"
    return None


def finish_reason_after(sequence: Sequence) -> FinishReason | None:
    """ "length" if the token just appended was the last that fits."""
    return "length" if len(sequence.token_ids) >= sequence.max_num_tokens else None

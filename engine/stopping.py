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


def finish_reason(sequence: Sequence, token_id: int) -> FinishReason | None:
    """What a newly sampled token, not yet appended, means for its sequence.

    "stop": it ends the sequence and does not join the output. The ranks mask end tokens before `min_tokens`,
    so one that comes all the same is an ordinary token. "length": it is the last that fits.
    """
    if token_id in sequence.stop_token_ids and sequence.num_output_tokens >= sequence.sampling.min_tokens:
        return "stop"
    return "length" if len(sequence.token_ids) + 1 >= sequence.max_num_tokens else None

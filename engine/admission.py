"""From an AddRequest to a Sequence, or a RequestError that says why not.

The api has validated the request; here is checked once more whatever could hurt the engine or the
ranks, because one malformed message must never cost the other requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import RequestError
from engine.messages import AddRequest, MediaItem
from engine.outbox import Client
from engine.sequence import Sequence
from engine.stopping import stop_token_ids


@dataclass(frozen=True, slots=True)
class Limits:
    """What one sequence may be at most."""

    max_model_len: int  # prompt and output
    max_kv_tokens: int  # tokens that fit into all KV blocks together
    vocab_size: int
    eos_token_ids: frozenset[int]


def make_sequence(seq_id: int, client: Client, request: AddRequest, limits: Limits, now: float) -> Sequence:
    """A waiting sequence. Raises RequestError when it could never run."""
    _check_prompt(request.prompt_token_ids, limits)
    _check_media(request.media, len(request.prompt_token_ids))
    num_prompt_tokens = len(request.prompt_token_ids)
    max_num_tokens = min(num_prompt_tokens + request.sampling.max_tokens, limits.max_model_len)
    if request.sampling.max_tokens < 1:
        raise RequestError("max_tokens must be at least 1", param="max_tokens")
    if max_num_tokens - 1 > limits.max_kv_tokens:  # the last token is never computed
        raise RequestError(
            f"{num_prompt_tokens} prompt tokens and up to {max_num_tokens - num_prompt_tokens} new ones "
            f"do not fit into the KV cache of {limits.max_kv_tokens} tokens; ask for fewer",
            code="context_length_exceeded",
        )
    arrival = request.arrival if 0.0 < request.arrival <= now else now  # also where it is NaN
    return Sequence(
        seq_id=seq_id,
        request_id=request.request_id,
        client=client,
        token_ids=list(request.prompt_token_ids),  # it grows, the message must not
        num_prompt_tokens=num_prompt_tokens,
        max_num_tokens=max_num_tokens,
        stop_token_ids=stop_token_ids(request.sampling, limits.eos_token_ids),
        sampling=request.sampling,
        media=list(request.media),
        priority=request.priority,
        arrival=arrival,
        tenant=request.tenant,
        cache_salt=request.cache_salt,
        deadline=arrival + request.timeout if request.timeout > 0.0 else 0.0,
    )


def _check_prompt(token_ids: list[int], limits: Limits) -> None:
    if not token_ids:
        raise RequestError("the prompt is empty", param="messages")
    if len(token_ids) >= limits.max_model_len:
        raise RequestError(
            f"the prompt has {len(token_ids)} tokens, which leaves no room to answer "
            f"in a context of {limits.max_model_len}",
            code="context_length_exceeded",
        )
    if min(token_ids) < 0 or max(token_ids) >= limits.vocab_size:
        raise RequestError(f"a prompt token id is outside [0, {limits.vocab_size})", param="prompt_token_ids")


def _check_media(media: list[MediaItem], num_prompt_tokens: int) -> None:
    """Items lie in order, apart from each other, inside the prompt."""
    end = 0
    for item in media:
        if item.num_tokens < 1 or item.offset < end or min(item.grid) < 1:
            raise RequestError(
                f"the {item.kind} at prompt position {item.offset} is misplaced or empty", status=500
            )
        end = item.offset + item.num_tokens
    if end > num_prompt_tokens:
        raise RequestError("an image or video reaches beyond the end of the prompt", status=500)

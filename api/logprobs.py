"""Log-probabilities as OpenAI's two endpoints show them.

Every generated token has an entry, those of the reasoning too. Values are natural logarithms of the model's
own distribution, before penalties and temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from api.tokenizer import Tokenizer
from engine.messages import TokenLogprobs

_LOWEST = -9999.0  # JSON has no -inf


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> dict[str, Any]:
    """The `logprobs` object of a chat choice or chunk."""
    content = []
    for token_id, logprob in zip(token_ids, logprobs, strict=True):
        entry = _chat_entry(tokenizer, token_id, logprob.logprob)
        top = zip(logprob.top_ids, logprob.top_logprobs, strict=True)
        entry["top_logprobs"] = [_chat_entry(tokenizer, other, value) for other, value in top]
        content.append(entry)
    return {"content": content, "refusal": None}


class TextLogprobs:
    """The `logprobs` objects of one text completion; follows the offset of each token in the text."""

    def __init__(self, tokenizer: Tokenizer, offset: int = 0) -> None:
        """`offset` is the number of characters that stand before the first token."""
        self._tokenizer = tokenizer
        self._offset = offset

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        tokens, offsets = [], []
        for token_id in token_ids:
            token = self._tokenizer.decode_token(token_id)[0]
            tokens.append(token)
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(logprob.logprob) for logprob in logprobs],
            "top_logprobs": [self._top(logprob) for logprob in logprobs],
            "text_offset": offsets,
        }

    def _top(self, logprob: TokenLogprobs) -> dict[str, float] | None:
        """By token text; of two tokens with the same text the likelier stays, as it comes first."""
        top: dict[str, float] = {}
        for token_id, value in zip(logprob.top_ids, logprob.top_logprobs, strict=True):
            top.setdefault(self._tokenizer.decode_token(token_id)[0], _finite(value))
        return top or None


def _chat_entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    token, raw = tokenizer.decode_token(token_id)
    return {"token": token, "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST

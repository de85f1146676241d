"""Sampled tokens made the next step's input where they are, without a way over the host."""

from __future__ import annotations

from cuda_ops.library import library
from cuda_ops.tensor import Tensor


def feed_tokens(
    sources: Tensor, sampled: Tensor, vision_from: int, token_ids: Tensor, token_types: Tensor
) -> None:
    """Put sampled[sources[i]] into token_ids[i], and its type into token_types[i], where there is a source.

    sources, token_ids, token_types [M] int32 · sampled [S] int32 · ids from vision_from on have type 1,
    others 0. Rows with a negative source stay as they are, and rows whose source is beyond S.
    """
    library.feed_tokens(sources, sampled, vision_from, token_ids, token_types)

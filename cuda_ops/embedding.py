"""Rows looked up in the vocabulary shard, and media features put in their place."""

from __future__ import annotations

from cuda_ops.library import library
from cuda_ops.tensor import Tensor


def embed_tokens(ids: Tensor, table: Tensor, vocab_start: int, out: Tensor) -> None:
    """Copy table row `ids[i] - vocab_start` to out row i; zeros where the row belongs to another rank.

    ids [M] int32 · table [V_local, H] fp32|bf16 · out [M, H] of table's type
    """
    library.embed_tokens(ids, table, vocab_start, out)


def scatter_rows(source: Tensor, rows: Tensor, out: Tensor) -> None:
    """Copy source row i to out row `rows[i]`; the other rows of out stay as they are.

    source [R, H] fp32|bf16 · rows [R] int32 · out [M, H] of source's type
    """
    library.scatter_rows(source, rows, out)

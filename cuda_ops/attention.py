"""Attention of the decoder over the paged KV cache, and of the vision tower inside its segments."""

from __future__ import annotations

from cuda_ops.library import library
from cuda_ops.tensor import Tensor


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    kv_lens: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """Write causal softmax(q k^T * scale) v of every sequence of the batch into out.

    q [M, nq, hd] fp32|bf16, rotated · k_cache, v_cache [num_blocks, nkv, block_size, hd] · nq a multiple of
    nkv · block_tables [S, B] int32 · query_starts [S+1] int32 rows of q · kv_lens [S] int32, this step's
    tokens included · out [M, nq*hd]
    Query i of a sequence sits at position kv_len - num_queries + i. Slots beyond kv_len are never read. KV is
    taken in segments of 256 positions from the sequence's start, so chunking a prompt changes no bit.
    """
    library.paged_attention(q, k_cache, v_cache, block_tables, query_starts, kv_lens, scale, out)


def segment_attention(qkv: Tensor, segment_starts: Tensor, scale: float, out: Tensor) -> None:
    """Write softmax(q k^T * scale) v into out, each patch seeing every patch of its own segment.

    qkv [P, 3, heads, hd] fp32|bf16 · segment_starts [N+1] int32 from 0 to P · out [P, heads*hd]
    Memory does not grow with the square of a segment's length.
    """
    library.segment_attention(qkv, segment_starts, scale, out)

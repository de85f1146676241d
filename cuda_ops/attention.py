"""Attention of the decoder over the paged KV cache, and of the vision tower inside its segments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cuda_ops.device_library import device_library
from cuda_ops.library import library
from cuda_ops.tensor import Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """Device memory for one batch's task lists and partial results, and for how many tasks it is sized.

    A captured graph keeps the plan it was captured with: size it by a bound of its batches, then fill it
    before each replay with plan_attention (which may be part of the graph).
    """

    memory: Tensor  # uint8, aligned to 256 bytes, of attention_plan_bytes
    short_tasks: int
    long_tasks: int


def attention_tasks(batch: Iterable[tuple[int, int]], heads_per_kv: int) -> tuple[int, int]:
    """(short, long) tasks of a batch of (num_queries, kv_len), for sizing a plan.

    A sequence is short when its query tokens times the query heads of a KV head are at most 16: decode. It
    then has a task per 256 keys; else one per 128 query rows and 4096 keys. S decoding sequences whose KV
    lengths sum to L have at most S + L / 256.
    """
    short = long = 0
    for num_queries, kv_len in batch:
        rows = num_queries * heads_per_kv
        if 0 < rows <= 16:
            short += -(-kv_len // 256)
        elif rows > 0:
            long += -(-rows // 128) * -(-kv_len // 4096)
    return short, long


def attention_plan_bytes(
    short_tasks: int, long_tasks: int, num_sequences: int, num_kv_heads: int, head_dim: int
) -> int:
    """Size of AttentionPlan.memory."""
    return int(
        device_library.attention_plan_bytes(short_tasks, long_tasks, num_sequences, num_kv_heads, head_dim)
    )


def plan_attention(
    plan: AttentionPlan,
    block_tables: Tensor,
    query_starts: Tensor,
    kv_lens: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
) -> None:
    """List on the device who attends to what, once per step; every layer's paged_attention reads it."""
    device_library.plan_attention(
        block_tables, query_starts, kv_lens, num_heads, num_kv_heads, head_dim, block_size,
        plan.short_tasks, plan.long_tasks, plan.memory,
    )  # fmt: skip


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    kv_lens: Tensor,
    scale: float,
    out: Tensor,
    plan: AttentionPlan | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Write causal softmax(q k^T * scale) v of every sequence of the batch into out.

    q [M, nq, hd] fp32|bf16, rotated · k_cache, v_cache [num_blocks, nkv, block_size, hd] · nq a multiple of
    nkv · block_tables [S, B] int32 · query_starts [S+1] int32 rows of q · kv_lens [S] int32, this step's
    tokens included · out [M, nq*hd]
    Query i of a sequence sits at position kv_len - num_queries + i. Slots beyond kv_len are never read. KV is
    taken in segments of 256 positions from the sequence's start, so chunking a prompt changes no bit.
    k_scales, v_scales [num_blocks, nkv, block_size] bf16 come with int8 caches, as rope_write_kv writes them.
    On a GPU: q, out and plain caches bf16, hd 32, 64 or 128, and the plan that plan_attention filled for this
    batch.
    """
    if plan is None:
        library.paged_attention(
            q, k_cache, v_cache, block_tables, query_starts, kv_lens, scale, out, k_scales, v_scales
        )
    else:
        device_library.paged_attention_planned(
            q, k_cache, v_cache, block_tables, query_starts, kv_lens, scale, out,
            plan.short_tasks, plan.long_tasks, plan.memory, k_scales, v_scales,
        )  # fmt: skip


def segment_attention(qkv: Tensor, segment_starts: Tensor, scale: float, out: Tensor) -> None:
    """Write softmax(q k^T * scale) v into out, each patch seeing every patch of its own segment.

    qkv [P, 3, heads, hd] fp32|bf16 · segment_starts [N+1] int32 from 0 to P · out [P, heads*hd]
    Memory does not grow with the square of a segment's length.
    """
    library.segment_attention(qkv, segment_starts, scale, out)

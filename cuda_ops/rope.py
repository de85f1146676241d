"""Rotary embeddings: the decoder's, joined with the write of K and V to the cache, and the vision tower's."""

from __future__ import annotations

from cuda_ops.library import library
from cuda_ops.tensor import Tensor


def rope_angles(positions: Tensor, axis: Tensor, inv_freq: Tensor, cos_sin: Tensor) -> None:
    """Write the cosine and sine of every rotation angle of a batch, once for all layers.

    positions [3, M] int32 (t, h, w) · axis [hd/2] int32: which of the three turns pair i · inv_freq [hd/2]
    fp32 · cos_sin [M, hd/2, 2] fp32
    """
    library.rope_angles(positions, axis, inv_freq, cos_sin)


def rope_write_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_out: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Rotate q and k by adjacent pairs (2i, 2i+1); write q to q_out, k and v to their cache slots.

    qkv [M, (nq+2nkv)*hd] fp32|bf16, each row Q then K then V · cos_sin [M, hd/2, 2] fp32 from rope_angles
    slots [M] int32 = block_id * block_size + offset · k_cache, v_cache [num_blocks, nkv, block_size, hd]
    q_out [M, nq, hd]; all of qkv's type
    int8 caches come with k_scales, v_scales [num_blocks, nkv, block_size] bf16, written as README.md says
    """
    library.rope_write_kv(qkv, cos_sin, slots, k_cache, v_cache, q_out, k_scales, v_scales)


def vision_rope(qkv: Tensor, row_col: Tensor, theta: float) -> None:
    """Rotate q and k of the vision tower in place, by half-split pairs (d, d + hd/2).

    qkv [P, 3, heads, hd] fp32|bf16, hd a multiple of 4 · row_col [P, 2] int32 in patches · the first hd/4
    pairs turn with the row, the others with the column; pair j of each turns by position * theta^(-4j/hd)
    """
    library.vision_rope(qkv, row_col, theta)

"""Makes transformers' vision tower fast for hundreds of small pictures in one call; the numbers stay the
same.

Its attention runs one call per picture; here pictures of equal size share one. Its resampler gathers frame
pairs in a Python loop; here NumPy makes the index. Coordinates are cached by size.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import apply_rotary_pos_emb_vision


def speed_up_vision(model: Any) -> None:
    """Replace the two slow methods on this model's own modules."""
    for block in model.model.vision_tower.blocks:
        block.attn.forward = partial(_attention, block.attn)
    resampler = model.model.resampler_model
    resampler._temporal_slicing = _pair_frames


@lru_cache(maxsize=4096)
def _coordinates(frames: int, rows: int, columns: int) -> torch.Tensor:
    """[frames * rows * columns, 2] row and column of every patch, windows of 2 x 2 together."""
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    windows = grid.reshape(rows // 2, 2, columns // 2, 2, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    return torch.from_numpy(np.tile(windows, (frames, 1)))


def patch_coordinates(grids: list[list[int]]) -> torch.Tensor:
    return torch.cat([_coordinates(*grid) for grid in grids])


def _attention(
    self: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **_: Any,
) -> torch.Tensor:
    """As Ernie4_5_VLMoeVisionAttention.forward, with one call per size of picture.

    hidden_states [P, width]; cu_seqlens on the CPU: [segments + 1]
    """
    num_patches = hidden_states.shape[0]
    q, k, v = self.qkv(hidden_states).reshape(num_patches, 3, self.num_heads, -1).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    order, sizes = _by_size(cu_seqlens.tolist())
    order = order.to(hidden_states.device, non_blocking=True)
    outputs = []
    for (count, length), *qkv in zip(
        sizes, *(t[order].split([c * n for c, n in sizes]) for t in (q, k, v)), strict=True
    ):
        batch = [t.reshape(count, length, self.num_heads, -1).transpose(1, 2) for t in qkv]
        query, key, value = batch
        attended = scaled_dot_product_attention(query, key, value, scale=self.scaling)
        outputs.append(attended.transpose(1, 2).reshape(count * length, -1))
    back = torch.empty_like(order)
    back[order] = torch.arange(num_patches, device=order.device)
    return self.proj(torch.cat(outputs)[back])


def _by_size(bounds: list[int]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Rows grouped by the length of their segment, and (segments, length) of every group."""
    groups: dict[int, list[int]] = defaultdict(list)
    for start, end in pairwise(bounds):
        groups[end - start].append(start)
    rows = [np.add.outer(starts, np.arange(length)).reshape(-1) for length, starts in groups.items()]
    return torch.from_numpy(np.concatenate(rows)), [
        (len(starts), length) for length, starts in groups.items()
    ]


def _pair_frames(hidden_states: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
    """[rows, C] -> [pairs, 2C]: even frames beside odd ones; a single picture beside itself."""
    first, second, offset = [], [], 0
    for frames, rows, columns in grid_thw.tolist():
        size = rows * columns // 4
        index = np.arange(offset, offset + frames * size).reshape(frames, size)
        first.append(index[0::2].reshape(-1))
        second.append(index[1::2].reshape(-1) if frames > 1 else index.reshape(-1))
        offset += frames * size
    device = hidden_states.device
    halves = [
        torch.from_numpy(np.concatenate(part)).to(device, non_blocking=True) for part in (first, second)
    ]
    return torch.cat([hidden_states[half] for half in halves], dim=-1)

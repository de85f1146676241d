"""Makes transformers' vision tower fast for hundreds of small pictures at once; the numbers stay the same.

Its attention runs one call per picture and layer. The tower treats patches alike whatever their order, so
pictures and frames of equal size are put side by side once (`VisionPlan`), and each size is one call. Its
resampler gathers frame pairs in a Python loop; here NumPy makes the index.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import apply_rotary_pos_emb_vision

Grid = tuple[int, int, int]  # frames, patch rows, patch columns


@dataclass(frozen=True)
class VisionPlan:
    """How the patches of many pictures and clips go through the tower.

    order        [P] int64: row i of the tower's input is this patch
    back         [P] int64: the inverse
    coordinates  [P, 2] row and column of the tower's rows
    bounds       [segments + 1] int32, where pictures and frames begin in the tower's rows
    """

    order: np.ndarray
    back: np.ndarray
    coordinates: np.ndarray
    bounds: np.ndarray


def plan_vision(grids: list[Grid]) -> VisionPlan:
    """Sorts frames by their number of patches; equal ones keep their order."""
    sizes = np.concatenate([np.full(frames, rows * columns) for frames, rows, columns in grids])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    by_size = np.argsort(sizes, kind="stable")
    order = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in by_size])
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    coordinates = np.concatenate([_coordinates(*grid) for grid in grids])[order]
    bounds = np.concatenate([[0], np.cumsum(sizes[by_size])]).astype(np.int32)
    return VisionPlan(order, back, coordinates, bounds)


@lru_cache(maxsize=4096)
def _coordinates(frames: int, rows: int, columns: int) -> np.ndarray:
    """[frames * rows * columns, 2] row and column of every patch, windows of 2 x 2 together."""
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    windows = grid.reshape(rows // 2, 2, columns // 2, 2, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    return np.tile(windows, (frames, 1))


def speed_up_vision(model: Any) -> None:
    """Replace the two slow methods on this model's own modules."""
    for block in model.model.vision_tower.blocks:
        block.attn.forward = partial(_attention, block.attn)
    model.model.resampler_model._temporal_slicing = _pair_frames


def _attention(
    self: Any,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **_: Any,
) -> torch.Tensor:
    """As Ernie4_5_VLMoeVisionAttention.forward, with one call for neighbours of equal size.

    hidden_states [P, width]; cu_seqlens on the CPU: [segments + 1]
    """
    num_patches = hidden_states.shape[0]
    q, k, v = self.qkv(hidden_states).reshape(num_patches, 3, self.num_heads, -1).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    outputs, start = [], 0
    for count, length in _runs(cu_seqlens.diff().tolist()):
        end = start + count * length
        query, key, value = (
            t[start:end].view(count, length, self.num_heads, -1).transpose(1, 2) for t in (q, k, v)
        )
        attended = scaled_dot_product_attention(query, key, value, scale=self.scaling)
        outputs.append(attended.transpose(1, 2).reshape(count * length, -1))
        start = end
    return self.proj(torch.cat(outputs))  # type: ignore[no-any-return]


def _runs(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """(how many, length) of neighbours of equal length."""
    for length, run in groupby(lengths):
        yield len(list(run)), length


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

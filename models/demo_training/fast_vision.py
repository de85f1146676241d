"""Runs transformers' vision tower and resampler fast for hundreds of small pictures, with the same numbers.

Their own attention is one call per picture and layer. The tower treats patches alike whatever their order,
so pictures and frames of equal size are put side by side once (`VisionPlan`): each size is one call. Their
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear, silu

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


def see(tower: Any, pixels: torch.Tensor, coordinates: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """pixels [P, 588], coordinates [P, 2] and bounds [segments + 1] of a `VisionPlan` -> [P, width].

    As the tower's own forward, with one attention for neighbours of equal size.
    """
    states = tower.patch_embed(pixels)
    cos, sin = (x[:, None, None].to(states.dtype) for x in tower.rotary_pos_emb(states, coordinates))
    runs = list(_runs(bounds.diff().tolist()))
    for block in tower.blocks:
        states = states + _attention(block.attn, block.norm1(states), cos, sin, runs)
        states = states + _quick_gelu_mlp(block.mlp, block.norm2(states))
    return tower.ln(states)  # type: ignore[no-any-return]


def _attention(
    attention: Any,
    states: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    runs: list[tuple[int, int]],
) -> torch.Tensor:
    """[P, width] -> [P, width]; runs: how many pictures of how many patches follow each other."""
    heads = attention.num_heads
    query_key, value = attention.qkv(states).unflatten(1, (3, heads, -1)).split((2, 1), dim=1)
    left, right = query_key.chunk(2, dim=-1)
    query_key = torch.addcmul(query_key * cos, torch.cat([-right, left], dim=-1), sin)
    outputs = []
    rows = [count * length for count, length in runs]
    for (count, length), pairs, values in zip(runs, query_key.split(rows), value.split(rows), strict=True):
        query, key, values = (
            t.reshape(count, length, heads, -1).transpose(1, 2).flatten(0, 1)
            for t in (*pairs.unbind(1), values)
        )
        attended = (query * attention.scaling @ key.transpose(1, 2)).softmax(-1) @ values
        outputs.append(attended.unflatten(0, (count, heads)).transpose(1, 2).reshape(count * length, -1))
    return attention.proj(torch.cat(outputs))  # type: ignore[no-any-return]


def _quick_gelu_mlp(mlp: Any, states: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x) is silu(1.702 x) / 1.702, and the factors go into the small weights."""
    inner = silu(linear(states, mlp.fc1.weight * 1.702, mlp.fc1.bias * 1.702))
    return linear(inner, mlp.fc2.weight / 1.702, mlp.fc2.bias)


def _runs(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """(how many, length) of neighbours of equal length."""
    for length, run in groupby(lengths):
        yield len(list(run)), length


def pair_frames(hidden_states: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
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
    return torch.cat([hidden_states.index_select(0, half) for half in halves], dim=-1)

"""Random weights of every kind on the device, in tiles, beside the matrix that they stand for."""

from __future__ import annotations

import torch

import cuda_ops
from cuda_ops.weight import WeightKind
from tests.gpu.machine import Machine


def random_weight(
    machine: Machine, kind: WeightKind, n: int, k: int, stack: int = 0, group: int = 64
) -> cuda_ops.Weight:
    """[stack, n, k], or [n, k] without a stack; products with normal rows come out near 1."""
    shape, device = ((stack,) if stack else ()) + (n, k), machine.device
    size = k**-0.5
    if kind == "bfloat16":
        data = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, size)
        return cuda_ops.Weight(kind, data)
    if kind == "int8":
        q = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        return cuda_ops.Weight(kind, q, _scales(machine, *shape[:-1], mean=size / 74))
    packed = torch.randint(0, 256, (*shape[:-1], k // 2), dtype=torch.uint8, device=device)
    return cuda_ops.Weight(kind, packed, _scales(machine, *shape[:-1], k // group, mean=size / 4.6), group)


def _scales(machine: Machine, *shape: int, mean: float) -> torch.Tensor:
    return (torch.rand(shape, device=machine.device) * mean + mean / 2).to(torch.bfloat16)


def dequantised(weight: cuda_ops.Weight) -> torch.Tensor:
    """The matrix in float64."""
    data, scales = weight.data, weight.scales
    if weight.kind == "int4":
        low, high = (data & 15).to(torch.int8), (data >> 4).to(torch.int8)
        q = torch.stack([low, high], -1).reshape(*data.shape[:-1], -1)
        q = torch.where(q > 7, q - 16, q).double()
        return q * scales.double().repeat_interleave(weight.group, -1)
    return data.double() if scales is None else data.double() * scales.double()[..., None]


def tiled(machine: Machine, weight: cuda_ops.Weight, is_gated: bool = False) -> cuda_ops.TiledWeight:
    n, k, lead = weight.out_features, weight.in_features, tuple(weight.data.shape[:-2])
    tiles, scales = cuda_ops.tiled_shapes(weight.kind, n, k, weight.group)
    made = cuda_ops.TiledWeight(
        weight.kind,
        machine.empty(*lead, *tiles, dtype=torch.uint8),
        None if scales is None else machine.empty(*lead, *scales),
        weight.group,
        n,
        k,
        is_gated,
    )
    cuda_ops.tile_weight(weight, made)
    return made


def tiled_router(machine: Machine, router: torch.Tensor) -> torch.Tensor:
    """[P, E, H] fp32 as route_experts takes it."""
    pools, experts, hidden = router.shape
    parts = cuda_ops.router_parts(hidden)
    split = router.reshape(pools * experts, parts, hidden // parts).transpose(0, 1).contiguous()
    shape = cuda_ops.tiled_shapes("float32", pools * experts, hidden // parts)[0]
    tiles = machine.empty(parts, *shape, dtype=torch.uint8)
    cuda_ops.tile_router(split, tiles)
    return tiles

"""The decoder's weights in the order in which a GPU multiplies them.

Loading, the weight cache and the CPU know rows; once a rank's weights are on its GPU, each matrix is tiled
and its rows are given back, so at any moment one matrix is there twice. Tiled products have an order that
ignores the batch (design D5). The vision tower keeps its rows: the framework multiplies by them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import cuda_ops
from cuda_ops import TiledWeight, Weight
from workers.device.base import Device, Tensor
from workers.model.weights import DecoderWeights, DenseWeights, MoeWeights

if TYPE_CHECKING:
    from workers.model.weights import Matrix


def tile_decoder(weights: DecoderWeights, device: Device, on_progress: Callable[[], None]) -> None:
    """Replace every matrix and router in place; `on_progress` is called after each layer."""
    weights.lm_head = _tiled(weights.lm_head, device)
    for layer in weights.layers:
        layer.qkv = _tiled(layer.qkv, device)
        layer.o_proj = _tiled(layer.o_proj, device)
        if isinstance(layer.mlp, MoeWeights):
            _tile_experts(layer.mlp, device)
        else:
            _tile_dense(layer.mlp, device)
        on_progress()


def _tile_experts(weights: MoeWeights, device: Device) -> None:
    pools = []
    while weights.pools:  # each is given back before the next is tiled
        up_gate, down = weights.pools[0]
        weights.pools = weights.pools[1:]
        pools.append((_tiled(up_gate, device, is_gated=True), _tiled(down, device)))
    weights.pools = pools
    weights.router = _tiled_router(weights.router, device)
    if weights.shared is not None:
        _tile_dense(weights.shared, device)


def _tile_dense(weights: DenseWeights, device: Device) -> None:
    weights.up_gate = _tiled(weights.up_gate, device, is_gated=True)
    weights.down = _tiled(weights.down, device)


def _tiled(weight: Matrix, device: Device, *, is_gated: bool = False) -> TiledWeight:
    plain = cast(Weight, weight)
    lead = tuple(plain.data.shape[:-2])
    tiles, scales = cuda_ops.tiled_shapes(plain.kind, plain.out_features, plain.in_features, plain.group)
    tiled = TiledWeight(
        plain.kind,
        device.empty((*lead, *tiles), "uint8"),
        device.empty((*lead, *scales), "bfloat16") if scales else None,
        plain.group,
        plain.out_features,
        plain.in_features,
        is_gated,
    )
    cuda_ops.tile_weight(plain, tiled)
    return tiled


def _tiled_router(router: Tensor, device: Device) -> Tensor:
    """[P, E, H] fp32 -> tiles of [parts, P * E, H / parts], as cuda_ops.route_experts takes them."""
    num_pools, num_experts, hidden = router.shape
    rows, num_parts = num_pools * num_experts, cuda_ops.router_parts(hidden)
    # Through the host: a megabyte or two, once, and no framework's way to rearrange it.
    parts = device.download(router).reshape(rows, num_parts, hidden // num_parts).swapaxes(0, 1)
    shape, _ = cuda_ops.tiled_shapes("float32", rows, hidden // num_parts)
    tiles = device.empty((num_parts, *shape), "uint8")
    cuda_ops.tile_router(device.upload(parts.copy()), tiles)
    return tiles

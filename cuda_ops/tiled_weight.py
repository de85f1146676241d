"""Weights in the order in which a GPU's tensor cores eat them, as the CUDA bodies take them.

`tile_weight` makes one out of a plain Weight on the device; csrc/gpu/packed_weight.h draws the order. The
values are the same, so are the bytes but for padding to tiles of 16 rows x 64 columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cuda_ops.device_library import device_library
from cuda_ops.tensor import Tensor
from cuda_ops.weight import KIND_INDEX, Weight, WeightKind

_TILE_BYTES = {"float32": 4096, "bfloat16": 2048, "int8": 1024, "int4": 512}  # of 16 x 64 elements


@dataclass(frozen=True)
class TiledWeight:
    """`[..., out_features, in_features]` in tiles; `tiled_shapes` gives the shapes of the tensors.

    is_gated  out_features are gate rows then up rows, and a product writes silu(gate) * up, half as wide
    """

    kind: WeightKind
    tiles: Tensor  # uint8 [..., row tiles, column tiles, bytes of a tile]
    scales: Tensor | None  # bf16 [..., row tiles, groups, 16]; None for the plain kinds
    group: int  # columns that share an int4 scale, 64 or 32; 0 for the other kinds
    out_features: int
    in_features: int
    is_gated: bool = False

    @property
    def num_bytes(self) -> int:
        scales = 0 if self.scales is None else 2 * math.prod(self.scales.shape)
        return int(math.prod(self.tiles.shape) + scales)

    @property
    def arguments(self) -> tuple[int, Any, Any, int, int, int, bool]:
        """What the compiled ops take for it."""
        return (KIND_INDEX[self.kind], self.tiles, self.scales, self.group, self.out_features,
                self.in_features, self.is_gated)  # fmt: skip


def tiled_shapes(
    kind: WeightKind, out_features: int, in_features: int, group: int = 0
) -> tuple[tuple[int, int, int], tuple[int, int, int] | None]:
    """Shapes of one matrix's tiles (uint8) and scales (bf16; None for the plain kinds)."""
    rows, columns = -(-out_features // 16), -(-in_features // 64)
    groups = {"int8": 1, "int4": columns * 64 // (group or 64)}.get(kind)
    return (rows, columns, _TILE_BYTES[kind]), None if groups is None else (rows, groups, 16)


def tile_weight(weight: Weight, tiled: TiledWeight) -> None:
    """Fill `tiled`, whose tensors the caller has allocated, with `weight` of the same kind and shape.

    Both on the device; [N, K] or stacks [count, N, K], of which a slice (one expert) may be given. K a
    multiple of 8; int4 groups of 64 or 32; a gated weight's N a multiple of 16.
    """
    if (weight.kind, weight.out_features, weight.in_features) != (
        tiled.kind, tiled.out_features, tiled.in_features,
    ):  # fmt: skip
        raise ValueError(
            f"tile_weight: the weight is {weight.kind} [{weight.out_features}, {weight.in_features}], its "
            f"tiles are for {tiled.kind} [{tiled.out_features}, {tiled.in_features}]"
        )
    kind, tiles, scales, *rest = tiled.arguments
    device_library.tile_weight(weight.data, weight.scales, kind, tiles, scales, *rest)


def router_parts(hidden: int) -> int:
    """How many equal parts the columns of the routers are cut into before they are tiled; see tile_router."""
    return int(device_library.router_parts(hidden))


def tile_router(parts: Tensor, tiles: Tensor) -> None:
    """Tile the routers of a layer for route_experts.

    parts [router_parts(H), P*E, H/parts] fp32: the routers [P, E, H] as one matrix, its columns cut ·
    tiles [parts, *tiled_shapes("float32", P*E, H/parts)[0]] uint8; route_experts takes them as `router`
    """
    _, rows, columns = (int(size) for size in parts.shape)
    device_library.tile_weight(parts, None, KIND_INDEX["float32"], tiles, None, 0, rows, columns, False)

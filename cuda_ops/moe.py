"""Mixture of experts: which experts a token uses, and their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cuda_ops.device_library import device_library
from cuda_ops.library import library
from cuda_ops.tensor import Tensor
from cuda_ops.tiled_weight import TiledWeight
from cuda_ops.weight import Weight


def route_experts(
    x: Tensor,
    router: Tensor,
    bias: Tensor,
    token_types: Tensor,
    top_k: int,
    norm_min: float,
    expert_ids: Tensor,
    expert_weights: Tensor,
) -> None:
    """Choose top_k experts per token inside the pool of its type, and their share of the output.

    x [M, H] fp32|bf16 · router [P, E, H] fp32 · bias [P, E] fp32 · token_types [M] int32, the pool or -1 for
    an inert row · expert_ids [M, k] int32 · expert_weights [M, k] fp32
    p = softmax(x . router) in fp32; the bias takes part in the choice only; weights are p over
    max(sum of the chosen p, norm_min). Ids are pool * E + e, by descending biased score, ties to the lowest
    index; an inert row gets id -1 and weight 0.
    On a GPU: x bf16, router tiled by tile_router, a workspace of routing_workspace_bytes.
    """
    library.route_experts(x, router, bias, token_types, top_k, norm_min, expert_ids, expert_weights)


def moe_experts(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    pools: Sequence[tuple[Weight, Weight]] | Sequence[tuple[TiledWeight, TiledWeight]],
    out: Tensor,
    shared: tuple[Weight | TiledWeight, Weight | TiledWeight] | None = None,
) -> None:
    """Write sum over j of expert_weights[:, j] * down(silu(gate x) * up x), + the shared expert, into out.

    x, out [M, H] fp32|bf16 of one type · expert_ids [M, k] int32, pool * E + e or -1 · expert_weights [M, k]
    fp32 · pools: per pool (up_gate Weight [E, 2*width, H], gate rows first; down Weight [E, H, width]); E is
    common, widths and formats may differ · shared (up_gate [2*width, H], down [H, width]), which all tokens
    use with weight 1. silu(gate) * up is rounded to x's type; with quantised weights x and it become int8 as
    in `linear`. The sum over j runs in routing order, then comes the shared expert, in fp32 and is rounded
    once. A row whose ids are all -1 has the shared expert's answer, or zeros.
    On a GPU: x bf16, weights tiled (up_gate gated) of one kind, a workspace of moe_workspace_bytes; no shared
    expert.
    """
    weights: list[Any] = [weight for pool in pools for weight in pool] + list(shared or ())
    if isinstance(weights[0], TiledWeight):
        if shared is not None:
            raise ValueError("moe_experts takes no shared expert on a GPU; use linear for it")
        device_library.moe_experts_tiled(
            x,
            expert_ids,
            expert_weights,
            [weight.tiles for weight in weights],
            [weight.tiles if weight.scales is None else weight.scales for weight in weights],
            [weight.arguments[0] for weight in weights],
            [weight.group for weight in weights],
            [down.in_features for _, down in pools],
            out,
        )
        return
    library.moe_experts(
        x,
        expert_ids,
        expert_weights,
        [weight.data for weight in weights],
        [weight.data if weight.scales is None else weight.scales for weight in weights],
        [weight.arguments[0] for weight in weights],
        [weight.group for weight in weights],
        shared is not None,
        out,
    )


def routing_workspace_bytes(num_tokens: int, hidden: int, num_pools: int, num_experts: int) -> int:
    """What route_experts needs of the workspace on a GPU; num_experts per pool."""
    return int(device_library.routing_workspace_bytes(num_tokens, hidden, num_pools, num_experts))


def moe_workspace_bytes(num_tokens: int, hidden: int, top_k: int, max_width: int, num_experts: int) -> int:
    """What moe_experts needs of the workspace on a GPU; num_experts of all pools, the larger pool's width."""
    return int(device_library.moe_workspace_bytes(num_tokens, hidden, top_k, max_width, num_experts))

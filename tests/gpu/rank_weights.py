"""Random weights of one rank in the formats of wint4, made and tiled on the device."""

from __future__ import annotations

import torch

from engine.model_config import ModelConfig
from tests.gpu.machine import Machine
from tests.gpu.weights import random_weight, tiled, tiled_router
from workers.model.weights import (
    DecoderWeights,
    DenseWeights,
    LayerWeights,
    ModelWeights,
    MoeWeights,
    resident_bytes,
)
from workers.parallel import Share


def random_rank(machine: Machine, model: ModelConfig, share: Share) -> ModelWeights:
    """The decoder of rank `share.rank`; no vision tower."""
    h, rows = model.hidden_size, len(share.vocab)
    norm = torch.ones(h, dtype=torch.bfloat16, device=machine.device)
    layers = [_layer(machine, model, share, index, norm) for index in range(model.num_layers)]
    embed = torch.empty(rows, h, dtype=torch.bfloat16, device=machine.device).normal_()
    head = tiled(machine, random_weight(machine, "bfloat16", rows, h))
    return ModelWeights(DecoderWeights(embed, head, norm, layers))


def _layer(
    machine: Machine, model: ModelConfig, share: Share, index: int, norm: torch.Tensor
) -> LayerWeights:
    h, hd = model.hidden_size, model.head_dim
    qkv_rows = (share.num_q_heads + 2 * share.num_kv_heads) * hd
    qkv = tiled(machine, random_weight(machine, "int8", qkv_rows, h))
    o_proj = tiled(machine, random_weight(machine, "int8", h, share.num_q_heads * hd))
    is_moe = index in model.moe_layers
    mlp = (
        _experts(machine, model, share)
        if is_moe
        else _dense(machine, h, _part(share, model.intermediate_size))
    )
    return LayerWeights(norm, norm, qkv, o_proj, mlp)


def _part(share: Share, width: int) -> int:
    return len(share.columns(width))


def _dense(machine: Machine, h: int, width: int) -> DenseWeights:
    up_gate = tiled(machine, random_weight(machine, "int8", 2 * width, h), is_gated=True)
    return DenseWeights(up_gate, tiled(machine, random_weight(machine, "int8", h, width)))


def _experts(machine: Machine, model: ModelConfig, share: Share) -> MoeWeights:
    h, count = model.hidden_size, model.num_experts
    router = torch.randn(model.num_pools, count, h, device=machine.device) * (2 * h**-0.5)
    pools = []
    for whole in model.moe_intermediate_sizes:
        width = _part(share, whole)
        group = 64 if width % 64 == 0 else 32
        up_gate = random_weight(machine, "int4", 2 * width, h, count, group)
        pools.append((tiled(machine, up_gate, is_gated=True),
                      tiled(machine, random_weight(machine, "int4", h, width, count, group))))  # fmt: skip
    bias = torch.zeros(model.num_pools, count, device=machine.device)
    width = _part(share, model.num_shared_experts * model.moe_intermediate_sizes[0])
    shared = _dense(machine, h, width) if model.num_shared_experts else None
    return MoeWeights(tiled_router(machine, router), bias, pools, shared)


def resident(weights: ModelWeights) -> int:
    """Bytes of all tensors."""
    return resident_bytes(weights)


def touched_bytes(weights: ModelWeights, model: ModelConfig, num_tokens: int) -> float:
    """What a step of so many text tokens reads: all but the embedding and the experts that nobody meets."""
    decoder = weights.decoder
    total = float(resident_bytes(weights) - decoder.embed_tokens.numel() * 2)
    met = 1 - (1 - model.moe_top_k / model.num_experts) ** num_tokens if model.num_experts else 0.0
    for layer in decoder.layers:
        if isinstance(layer.mlp, MoeWeights):
            sizes = [up.num_bytes + down.num_bytes for up, down in layer.mlp.pools]
            total -= sum(sizes) - met * sizes[0]
    return total

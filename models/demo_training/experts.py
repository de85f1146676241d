"""A faster dispatch of transformers' experts for few experts and many tokens.

Tokens are sorted by expert once, each expert multiplies one contiguous slice, and the slices are added back.
Registered under its own name; transformers' eager loop gives the same numbers (tests/models).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "sorted_slices"


def sorted_slices(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """hidden_states [S, H], top_k_index and top_k_weights [S, k] -> [S, H]"""
    num_tokens, top_k = top_k_index.shape
    if not num_tokens:
        return torch.zeros_like(hidden_states)
    order = torch.argsort(top_k_index.reshape(-1), stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    counts = torch.bincount(top_k_index.reshape(-1), minlength=experts.num_experts).tolist()
    rows = _Copies.apply(hidden_states, order, back, top_k)
    outputs = []
    for expert, part in enumerate(rows.split(counts)):
        if len(part):
            gate, up = functional.linear(part, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            outputs.append(functional.linear(experts.act_fn(gate) * up, experts.down_proj[expert]))
    chosen = _Permuted.apply(torch.cat(outputs), back, order).view(num_tokens, top_k, -1)
    return torch.bmm(top_k_weights.to(chosen.dtype).unsqueeze(1), chosen).squeeze(1).to(hidden_states.dtype)


class _Copies(torch.autograd.Function):
    """Row i is token order[i] // k. Backward sums k neighbours, where indexing would add rows one by one."""

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, order: torch.Tensor, back: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        ctx.save_for_backward(back)
        ctx.top_k = top_k
        return tokens.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        return gradient.index_select(0, back).unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return gradient.index_select(0, *ctx.saved_tensors), None, None


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, sorted_slices)

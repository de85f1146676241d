"""Transformers' decoder on packed tokens: no padding, no masks, and the last layer only where it matters.

All layers but attention treat tokens alike, so the tokens of a micro-batch lie behind each other, all words
first and all picture tokens behind them: each pool of experts gets one slice. Attention gathers rectangles
and scatters them back. Behind the last attention only tokens go on whose next one bears loss. The modules and
their weights are transformers'; tests/models holds the losses to those of its own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import rms_norm

from models.demo_training.collate import MicroBatch

Watcher = Callable[[int, torch.Tensor], None]


@dataclass
class Packing:
    """Where the tokens of a micro-batch lie. N tokens in B rectangles of up to L.

    place         [N] of each packed token in the flattened rectangles [B * L]
    source        [B * L] packed token of each place; 0 where there is padding
    num_words     packed tokens before this go to the text experts
    num_embedded  and before this have word embeddings: words and the marks around media; features follow
    last          [M] packed tokens that go on behind the last attention, in the order of their targets
    hidden        [B or 1, 1, L, L] 0 or -inf: whether a row's token may look at a column's
    """

    place: torch.Tensor
    source: torch.Tensor
    num_words: int
    num_embedded: int
    last: torch.Tensor
    size: tuple[int, int]
    hidden: torch.Tensor


def pack(batch: MicroBatch, placeholder: int) -> Packing:
    rows, columns = batch.token_ids.shape
    known = np.flatnonzero(np.arange(columns) < batch.lengths[:, None])
    is_vision = batch.token_types.reshape(-1)[known] > 0
    is_feature = batch.token_ids.reshape(-1)[known] == placeholder
    place = np.concatenate([known[~is_vision], known[is_vision & ~is_feature], known[is_feature]])
    source = np.zeros(rows * columns, np.int64)
    source[place] = np.arange(len(place))
    last = source[np.flatnonzero(batch.answers) - 1]  # no answer begins a row
    return Packing(
        torch.from_numpy(place),
        torch.from_numpy(source),
        int((~is_vision).sum()),
        int((~is_feature).sum()),
        torch.from_numpy(last),
        (rows, columns),
        _hidden(batch),
    )


def _hidden(batch: MicroBatch) -> torch.Tensor:
    """What is later is hidden, and what belongs to another branch."""
    columns = batch.token_ids.shape[1]
    hidden = np.triu(np.ones((1, columns, columns), bool), 1)
    if batch.branches.any():
        key, query = batch.branches[:, None, :], batch.branches[:, :, None]
        hidden = hidden | ((key != 0) & (key != query))
    return torch.from_numpy(np.where(hidden, np.float32(-np.inf), np.float32(0)))[:, None]


def decode(
    model: Any,
    embeddings: torch.Tensor,
    positions: torch.Tensor,
    packing: Packing,
    on_attention: Watcher | None = None,
) -> torch.Tensor:
    """embeddings [N, H], positions [3, N] -> [M, H] after the last norm, at `packing.last`.

    on_attention: gets the layer's number and its attention [B, heads, L, L], as probabilities.
    """
    decoder = model.model.language_model
    turns = _rotations(decoder.rotary_emb, embeddings, positions)
    states, num_words = embeddings, packing.num_words
    for number, layer in enumerate(decoder.layers):
        is_last = layer is decoder.layers[-1]
        watch = None if on_attention is None else partial(on_attention, number)
        attended = _attention(layer.self_attn, _norm(layer.input_layernorm, states), turns, packing, watch)
        if is_last:
            states, attended = (x.index_select(0, packing.last) for x in (states, attended))
            num_words = len(packing.last)
        states = states + layer.self_attn.o_proj(attended)
        normed = _norm(layer.post_attention_layernorm, states)
        states = states + _feed_forward(layer.mlp, normed, num_words)
    return _norm(decoder.norm, states)


def _norm(norm: Any, states: torch.Tensor) -> torch.Tensor:
    return rms_norm(states, (states.shape[-1],), norm.weight, norm.variance_epsilon)


def _rotations(rotary: Any, like: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[N, 1, head_dim / 2] complex: by how much each pair of adjacent channels is turned."""
    cos, sin = rotary(like, positions[:, None])
    return torch.complex(cos[0, :, ::2].contiguous(), sin[0, :, ::2].contiguous())[:, None]


def _turn(states: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """[N, heads, head_dim] in fp32 and back."""
    pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(states.dtype)


def _attention(
    attention: Any,
    states: torch.Tensor,
    turns: torch.Tensor,
    packing: Packing,
    watch: Callable[[torch.Tensor], None] | None,
) -> torch.Tensor:
    """[N, H] -> [N, heads * head_dim], before the output projection."""
    width = attention.head_dim
    query, key, value = (
        project(states) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = (_turn(x.view(len(x), -1, width), turns).flatten(1) for x in (query, key))
    rectangles = _Spread.apply(torch.cat([query, key, value], dim=1), packing.source, packing.place)
    rows, columns = packing.size
    query, key, value = (
        part.reshape(rows, columns, -1, width).transpose(1, 2)
        for part in rectangles.split([query.shape[1], key.shape[1], value.shape[1]], dim=1)
    )
    # Written out: PyTorch's fused attention is three times slower in bf16 on a CPU, backward.
    scores = (query * attention.scaling) @ key.transpose(2, 3) + packing.hidden.to(query.dtype)
    probabilities = scores.softmax(-1)
    if watch is not None:
        watch(probabilities)
    attended = (probabilities @ value).transpose(1, 2).reshape(rows * columns, -1)
    return _Pick.apply(attended, packing.place)  # type: ignore[no-any-return]


def _feed_forward(mlp: Any, states: torch.Tensor, num_words: int) -> torch.Tensor:
    if not hasattr(mlp, "text_moe"):
        return mlp(states)  # type: ignore[no-any-return]
    parts = [_experts(mlp.text_moe, states[:num_words])]
    if num_words < len(states):
        parts.append(_experts(mlp.vision_moe, states[num_words:]))
    mixed = torch.cat(parts)
    return mixed if mlp.shared_experts is None else mixed + mlp.shared_experts(states)


def _experts(block: Any, states: torch.Tensor) -> torch.Tensor:
    _, weights, chosen = block.gate(states)
    mixed: torch.Tensor = block.experts(states, chosen, weights)
    return mixed


class _Spread(torch.autograd.Function):
    """Packed tokens to rectangles. Padding is behind causal attention: no gradient comes from it."""

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor, source: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        return packed.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return gradient.index_select(0, *ctx.saved_tensors), None, None


class _Pick(torch.autograd.Function):
    """Rectangles to packed tokens."""

    @staticmethod
    def forward(ctx: Any, rectangles: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.places = len(rectangles)
        return rectangles.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (place,) = ctx.saved_tensors
        spread = gradient.new_zeros(ctx.places, gradient.shape[1])
        return spread.index_copy_(0, place, gradient), None

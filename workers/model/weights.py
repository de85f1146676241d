"""The loaded weights of one rank, as the model code consumes them.

Filled by workers/loader.py, read by the files beside this one. Every matrix is out-major: a `Weight` has
rows of `in_features` contiguous values, whatever the checkpoint's layout was. Shards follow
workers/parallel.py: attention by heads, feed-forward and experts by width, vocabulary by rows; norms,
routers, the vision transformer and the resampler are whole on every rank. T below is the activation
dtype (fp32 or bf16).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from workers.device.base import BYTES_PER_ELEMENT, Tensor

if TYPE_CHECKING:
    from cuda_ops import TiledWeight, Weight

    Matrix = Weight | TiledWeight  # a GPU's decoder has tiled ones (workers/tiling.py)
    Pools = Sequence[tuple[Weight, Weight]] | Sequence[tuple[TiledWeight, TiledWeight]]


@dataclass(slots=True)
class DenseWeights:
    """A SwiGLU block of one local width I (a dense layer, or the shared experts fused into one)."""

    up_gate: Matrix  # [2*I, H], gate rows first, then up rows
    down: Matrix  # [H, I]


@dataclass(slots=True)
class MoeWeights:
    """The experts of one layer. Pool 0 is text, pool 1 vision; their widths differ."""

    router: Tensor  # [P, E, H] fp32; tiled on a GPU
    bias: Tensor  # [P, E] fp32, only selects experts, never weighs them; zeros if the checkpoint has none
    pools: Pools  # per pool: up_gate [E, 2*mi, H] (gate first), down [E, H, mi]
    shared: DenseWeights | None  # read by all tokens of both pools


@dataclass(slots=True)
class LayerWeights:
    input_norm: Tensor  # [H] T
    post_attention_norm: Tensor  # [H] T
    qkv: Matrix  # [(nq + 2*nkv) * hd, H] of this rank's heads, rows Q | K | V
    o_proj: Matrix  # [H, nq * hd]
    mlp: DenseWeights | MoeWeights


@dataclass(slots=True)
class DecoderWeights:
    embed_tokens: Tensor  # [V_local, H] T, rows rank*V_local and up; rows beyond the vocabulary are zeros
    lm_head: Matrix  # [V_local, H]; shares memory with embed_tokens when tied
    norm: Tensor  # [H] T
    layers: list[LayerWeights]


@dataclass(slots=True)
class VisionBlockWeights:
    """One block of the vision transformer, width D and inner width F; biases and norms are T."""

    norm1_w: Tensor  # [D]
    norm1_b: Tensor
    qkv: Weight  # [3*D, D], rows q | k | v, each heads * head_dim
    qkv_b: Tensor  # [3*D]
    proj: Weight  # [D, D]
    proj_b: Tensor  # [D]
    norm2_w: Tensor  # [D]
    norm2_b: Tensor
    fc1: Weight  # [F, D]
    fc1_b: Tensor  # [F]
    fc2: Weight  # [D, F]
    fc2_b: Tensor  # [D]


@dataclass(slots=True)
class VisionWeights:
    patch_embed: Weight  # [D, 3*14*14], no bias
    blocks: list[VisionBlockWeights]
    ln_w: Tensor  # [D]
    ln_b: Tensor


@dataclass(slots=True)
class ResamplerWeights:
    """Merges windows, then frame pairs: W = 4*D (one 2x2 window of patches side by side)."""

    spatial_0: Weight  # [W, W]
    spatial_0_b: Tensor  # [W]
    spatial_2: Weight  # [W, W]
    spatial_2_b: Tensor
    spatial_ln_w: Tensor  # [W]
    spatial_ln_b: Tensor
    temporal_0: Weight  # [W, 2*W]
    temporal_0_b: Tensor  # [W]
    temporal_2: Weight  # [W, W]
    temporal_2_b: Tensor
    temporal_ln_w: Tensor  # [W]
    temporal_ln_b: Tensor
    mlp: Weight  # [H, W]
    mlp_b: Tensor  # [H]
    after_norm: Tensor  # [H], RMS norm with the decoder's eps


@dataclass(slots=True)
class ModelWeights:
    decoder: DecoderWeights
    vision: VisionWeights | None = None  # None for text models
    resampler: ResamplerWeights | None = None


def resident_bytes(weights: ModelWeights) -> int:
    """Bytes of all tensors, each counted once however many fields hold it (a tied head)."""
    tensors = {id(tensor): tensor for tensor in _tensors(weights)}
    return sum(prod(t.shape) * BYTES_PER_ELEMENT[str(t.dtype).rpartition(".")[2]] for t in tensors.values())


def _tensors(part: Any) -> Iterator[Tensor]:
    if is_dataclass(part):
        for field in fields(part):
            yield from _tensors(getattr(part, field.name))
    elif isinstance(part, list | tuple):
        for item in part:
            yield from _tensors(item)
    elif hasattr(part, "__dlpack__"):
        yield part

"""Every tensor a model has, and what it is called in the two published layouts.

A `LogicalTensor` is out-major: [out, in] for a linear. On disk a linear is

    scheme A (-Paddle)   [in, out], q/k/v and gate/up fused along `out`
    scheme B (-PT)       [out, in], q/k/v and gate/up separate, in the fused order

and every other tensor is stored alike in both. Routers stay [hidden, experts] in both. Names here carry no
`ernie.`/`model.` prefix. Sources: model specification sections 2.2 and 2.3. Which part of a tensor a rank
needs is in shards.py, reading is in checkpoint.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from engine.model_config import ModelConfig, VisionConfig

Scheme = Literal["A", "B"]


class Role(Enum):
    """What a tensor does: decides how it is cut over ranks (shards.py) and quantised (quant.py)."""

    VOCAB = "vocabulary rows"
    QKV = "attention qkv_proj"
    ATTENTION_OUT = "attention o_proj"
    DENSE_UP = "dense up_gate_proj"
    DENSE_DOWN = "dense down_proj"
    SHARED_UP = "shared experts' up_gate_proj"
    SHARED_DOWN = "shared experts' down_proj"
    EXPERT_UP = "routed experts' up_gate_proj"
    EXPERT_DOWN = "routed experts' down_proj"
    ROUTER = "router"
    CORRECTION = "correction bias"
    NORM = "decoder norm"
    VISION = "vision"  # tower and resampler, matrices, biases and norms: whole on every rank


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """name is scheme A's, without its prefix and without `.weight` for linears that B may split."""

    name: str
    role: Role
    shape: tuple[int, ...]  # linears [out, in]; others as stored
    is_linear: bool = False  # transposed in scheme A
    parts: tuple[tuple[str, int], ...] = ()  # scheme B's separate names and their rows, in order

    def stored(self, scheme: Scheme) -> dict[str, tuple[int, ...]]:
        """Names and shapes on disk, without prefix."""
        if not self.is_linear:
            return {self.name: self.shape}
        if scheme == "A":
            return {self.name: self.shape[::-1]}
        if not self.parts:
            return {self.name: self.shape}
        folder = self.name.rsplit(".", 2)[0]
        return {f"{folder}.{part}.weight": (rows, *self.shape[1:]) for part, rows in self.parts}


def model_tensors(model: ModelConfig) -> Iterator[LogicalTensor]:
    """All tensors of a model in loading order.

    tie_word_embeddings and num_shared_experts must have been decided: None counts as tied and as 0.
    """
    hidden = model.hidden_size
    yield LogicalTensor("embed_tokens.weight", Role.VOCAB, (model.vocab_size, hidden))
    for layer in range(model.num_layers):
        yield from _layer(model, layer)
    yield LogicalTensor("norm.weight", Role.NORM, (hidden,))
    if model.tie_word_embeddings is False:
        yield LogicalTensor("lm_head.weight", Role.VOCAB, (model.vocab_size, hidden), is_linear=True)
    if model.vision is not None:
        yield from _vision_tower(model.vision)
        yield from _resampler(model.vision, hidden)


def _layer(model: ModelConfig, layer: int) -> Iterator[LogicalTensor]:
    root, hidden = f"layers.{layer}", model.hidden_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    yield LogicalTensor(f"{root}.input_layernorm.weight", Role.NORM, (hidden,))
    yield LogicalTensor(f"{root}.post_attention_layernorm.weight", Role.NORM, (hidden,))
    yield LogicalTensor(
        f"{root}.self_attn.qkv_proj.weight",
        Role.QKV,
        (queries + 2 * keys, hidden),
        is_linear=True,
        parts=(("q_proj", queries), ("k_proj", keys), ("v_proj", keys)),
    )
    yield LogicalTensor(
        f"{root}.self_attn.o_proj.weight", Role.ATTENTION_OUT, (hidden, queries), is_linear=True
    )
    if not model.is_moe_layer(layer):
        yield from _mlp(f"{root}.mlp", hidden, model.intermediate_size, Role.DENSE_UP, Role.DENSE_DOWN)
        return
    yield from _routers(model, f"{root}.mlp")
    for expert in range(model.num_pools * model.num_experts):
        width = model.moe_intermediate_sizes[expert // model.num_experts]
        yield from _mlp(f"{root}.mlp.experts.{expert}", hidden, width, Role.EXPERT_UP, Role.EXPERT_DOWN)
    if model.shared_intermediate_size:
        width = model.shared_intermediate_size
        yield from _mlp(f"{root}.mlp.shared_experts", hidden, width, Role.SHARED_UP, Role.SHARED_DOWN)


def _routers(model: ModelConfig, root: str) -> Iterator[LogicalTensor]:
    for pool in range(model.num_pools):
        name = f"{root}.gate.weight" + ("_1" if pool else "")
        yield LogicalTensor(name, Role.ROUTER, (model.hidden_size, model.num_experts))
    yield LogicalTensor(
        f"{root}.moe_statics.e_score_correction_bias",
        Role.CORRECTION,
        (model.num_pools, model.num_experts),
    )


def _mlp(root: str, hidden: int, width: int, up: Role, down: Role) -> Iterator[LogicalTensor]:
    yield LogicalTensor(
        f"{root}.up_gate_proj.weight",
        up,
        (2 * width, hidden),
        is_linear=True,
        parts=(("gate_proj", width), ("up_proj", width)),  # gate first, in spite of the fused name
    )
    yield LogicalTensor(f"{root}.down_proj.weight", down, (hidden, width), is_linear=True)


def _vision_tower(vision: VisionConfig) -> Iterator[LogicalTensor]:
    width, inner = vision.hidden_size, vision.intermediate_size
    yield _vision_linear("vision_model.patch_embed.proj.weight", width, vision.patch_features)
    for block in range(vision.depth):
        root = f"vision_model.blocks.{block}"
        yield from _vision_norm(f"{root}.norm1", width)
        yield from _biased(f"{root}.attn.qkv", 3 * width, width)
        yield from _biased(f"{root}.attn.proj", width, width)
        yield from _vision_norm(f"{root}.norm2", width)
        yield from _biased(f"{root}.mlp.fc1", inner, width)
        yield from _biased(f"{root}.mlp.fc2", width, inner)
    yield from _vision_norm("vision_model.ln", width)


def _resampler(vision: VisionConfig, hidden: int) -> Iterator[LogicalTensor]:
    root, width = "resampler_model", vision.merged_size
    for stage, inputs in (("spatial_linear", width), ("temporal_linear", width * vision.temporal_merge)):
        yield from _biased(f"{root}.{stage}.0", width, inputs)
        yield from _biased(f"{root}.{stage}.2", width, width)
        yield from _vision_norm(f"{root}.{stage}.3", width)
    yield from _biased(f"{root}.mlp", hidden, width)
    yield LogicalTensor(f"{root}.after_norm.weight", Role.VISION, (hidden,))


def _biased(root: str, outputs: int, inputs: int) -> Iterator[LogicalTensor]:
    yield _vision_linear(f"{root}.weight", outputs, inputs)
    yield LogicalTensor(f"{root}.bias", Role.VISION, (outputs,))


def _vision_linear(name: str, outputs: int, inputs: int) -> LogicalTensor:
    return LogicalTensor(name, Role.VISION, (outputs, inputs), is_linear=True)


def _vision_norm(root: str, width: int) -> Iterator[LogicalTensor]:
    yield LogicalTensor(f"{root}.weight", Role.VISION, (width,))
    yield LogicalTensor(f"{root}.bias", Role.VISION, (width,))


# quantised weights: the linear's `weight` is replaced by two tensors (specification section 8.4)
PLAIN, QUANTISED, SCALE = "weight", "quant_weight", "weight_scale"
EXPERTS = frozenset({Role.EXPERT_UP, Role.EXPERT_DOWN})


def quantised_name(name: str, kind: str) -> str:
    """`x.weight` under another last part."""
    return name.removesuffix(PLAIN) + kind


# names on disk ------------------------------------------------------------------------------------

_PREFIX = re.compile(r"^(ernie|model)\.")
# Multi-token prediction heads of some text models, and tables that every reader computes itself.
_IGNORABLE = re.compile(r"(^|\.)(mtp_block|mtp_emb_norm|mtp_hidden_norm|mtp_linear_proj)\.|inv_freq$")
_NUMBERED = re.compile(r"^(layers|vision_model\.blocks)\.(\d+)\.")


def plain_name(stored_name: str) -> str:
    """A name on disk without its `ernie.` or `model.` prefix: exports differ in where they put one."""
    return _PREFIX.sub("", stored_name)


def is_ignorable(name: str) -> bool:
    return _IGNORABLE.search(name) is not None


def is_beyond(name: str, model: ModelConfig) -> bool:
    """Whether a plain name belongs to a layer or vision block past the configuration's last one."""
    match = _NUMBERED.match(name)
    if match is None:
        return False
    if match[1] == "layers":
        return int(match[2]) >= model.num_layers
    return model.vision is not None and int(match[2]) >= model.vision.depth


def scheme_of(names: set[str]) -> Scheme | None:
    """A if any name is fused, B if any is separate, None if neither tells."""
    if any(".qkv_proj." in name or ".up_gate_proj." in name for name in names):
        return "A"
    return "B" if any(".q_proj." in name for name in names) else None

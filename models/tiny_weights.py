"""Every tensor of a tiny model, with bits that do not depend on the machine.

A value comes from the raw integers of a PCG64 seeded by (seed, name of the tensor), scaled once in fp32, so
neither the order of the tensors nor NumPy's sampling methods can change it. Both layouts are written
from the same logical tensors; fused and separate names differ only in `_store`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import TensorSpec, serialize_file

from models.tiny_config import Layout, TinyModel

Kind = Literal["linear", "table", "norm", "bias", "router", "correction"]


@dataclass(frozen=True)
class Logical:
    """A tensor by its name in the -Paddle layout, without prefix; a linear's shape is [out, in]."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...] = ()  # separate names in the -PT layout, with their rows, in order


def write_weights(file: Path, model: TinyModel, layout: Layout, seed: int) -> None:
    """Write all tensors as one safetensors file, bf16 or fp32; routers and their bias are always fp32."""
    stored: dict[str, np.ndarray] = {}
    for tensor in logical_tensors(model):
        stored.update(_store(tensor, make_values(tensor, model, seed), layout))
    specs = {}
    for name in list(stored):
        keeps_fp32 = ".gate." in name or "e_score_correction_bias" in name
        if model.dtype == "bfloat16" and not keeps_fp32:
            stored[name] = _bf16_bits(stored[name])
        values = stored[name]
        specs[name] = TensorSpec(
            dtype="bfloat16" if values.dtype == np.uint16 else "float32",
            shape=list(values.shape),
            data_ptr=values.ctypes.data,
            data_len=values.nbytes,
        )
    serialize_file(specs, file, {"format": "pt"})


def make_values(tensor: Logical, model: TinyModel, seed: int) -> np.ndarray:
    """fp32 values of the tensor's shape, uniform around 0 (norms: around 1)."""
    scale = {"linear": model.weight_std, "table": model.weight_std, "router": model.weight_std}.get(
        tensor.kind, 0.05 if tensor.kind in ("correction", "norm") else 0.02
    )
    half_width = np.float32(scale * 3**0.5)  # of a uniform distribution with this standard deviation
    values = _uniform(seed, tensor.name, int(np.prod(tensor.shape))) * half_width
    if tensor.kind == "norm":
        values += np.float32(1.0)
    return values.reshape(tensor.shape)


def _uniform(seed: int, name: str, count: int) -> np.ndarray:
    """fp32 multiples of 2^-23 in [-1, 1)."""
    generator = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))
    integers = generator.random_raw((count + 1) // 2).view(np.uint32)[:count] >> 8
    return integers.astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    """Nearest bf16, ties to even, as uint16."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _store(tensor: Logical, values: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """The tensor under its names and in its orientation on disk."""
    root = "" if tensor.name.startswith(("vision_model.", "lm_head.")) else f"{_PREFIXES[layout]}."
    if tensor.kind != "linear":
        return {root + tensor.name: np.ascontiguousarray(values)}
    if layout == "paddle":
        return {root + tensor.name: np.ascontiguousarray(values.T)}
    if not tensor.parts:
        return {root + tensor.name: values}
    folder = tensor.name.rsplit(".", 2)[0]
    ends = np.cumsum([rows for _, rows in tensor.parts])
    return {
        f"{root}{folder}.{name}.weight": np.ascontiguousarray(values[end - rows : end])
        for (name, rows), end in zip(tensor.parts, ends, strict=True)
    }


_PREFIXES = {"paddle": "ernie", "pt": "model"}


def logical_tensors(model: TinyModel) -> Iterator[Logical]:
    hidden = model.hidden_size
    yield Logical("embed_tokens.weight", "table", (model.vocab_size, hidden))
    for layer in range(model.num_layers):
        yield from _layer(model, layer)
    yield Logical("norm.weight", "norm", (hidden,))
    if not model.tied:
        yield Logical("lm_head.weight", "linear", (model.vocab_size, hidden))
    yield from _vision(model)
    yield from _resampler(model)


def _layer(model: TinyModel, layer: int) -> Iterator[Logical]:
    root, hidden = f"layers.{layer}", model.hidden_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    yield Logical(f"{root}.input_layernorm.weight", "norm", (hidden,))
    yield Logical(f"{root}.post_attention_layernorm.weight", "norm", (hidden,))
    yield Logical(
        f"{root}.self_attn.qkv_proj.weight",
        "linear",
        (queries + 2 * keys, hidden),
        (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)),
    )
    yield Logical(f"{root}.self_attn.o_proj.weight", "linear", (hidden, queries))
    if layer not in model.expert_layers:
        yield from _mlp(f"{root}.mlp", hidden, model.intermediate_size)
        return
    experts = model.num_experts
    yield Logical(f"{root}.mlp.gate.weight", "router", (hidden, experts))
    yield Logical(f"{root}.mlp.gate.weight_1", "router", (hidden, experts))
    yield Logical(f"{root}.mlp.moe_statics.e_score_correction_bias", "correction", (2, experts))
    for expert in range(2 * experts):
        yield from _mlp(f"{root}.mlp.experts.{expert}", hidden, model.expert_widths[expert // experts])
    if model.shared_width:
        yield from _mlp(f"{root}.mlp.shared_experts", hidden, model.shared_width)


def _mlp(root: str, hidden: int, width: int) -> Iterator[Logical]:
    parts = (("gate_proj", width), ("up_proj", width))
    yield Logical(f"{root}.up_gate_proj.weight", "linear", (2 * width, hidden), parts)
    yield Logical(f"{root}.down_proj.weight", "linear", (hidden, width))


def _vision(model: TinyModel) -> Iterator[Logical]:
    width = model.vision_hidden
    yield Logical("vision_model.patch_embed.proj.weight", "linear", (width, 3 * 14 * 14))
    for block in range(model.vision_depth):
        root = f"vision_model.blocks.{block}"
        yield from _layer_norm(f"{root}.norm1", width)
        yield from _linear(f"{root}.attn.qkv", 3 * width, width)
        yield from _linear(f"{root}.attn.proj", width, width)
        yield from _layer_norm(f"{root}.norm2", width)
        yield from _linear(f"{root}.mlp.fc1", 4 * width, width)
        yield from _linear(f"{root}.mlp.fc2", width, 4 * width)
    yield from _layer_norm("vision_model.ln", width)


def _resampler(model: TinyModel) -> Iterator[Logical]:
    root, width = "resampler_model", model.merged_size
    for stage, inputs in (("spatial_linear", width), ("temporal_linear", 2 * width)):
        yield from _linear(f"{root}.{stage}.0", width, inputs)
        yield from _linear(f"{root}.{stage}.2", width, width)
        yield from _layer_norm(f"{root}.{stage}.3", width)
    yield from _linear(f"{root}.mlp", model.hidden_size, width)
    yield Logical(f"{root}.after_norm.weight", "norm", (model.hidden_size,))


def _linear(root: str, outputs: int, inputs: int) -> Iterator[Logical]:
    yield Logical(f"{root}.weight", "linear", (outputs, inputs))
    yield Logical(f"{root}.bias", "bias", (outputs,))


def _layer_norm(root: str, width: int) -> Iterator[Logical]:
    yield Logical(f"{root}.weight", "norm", (width,))
    yield Logical(f"{root}.bias", "bias", (width,))

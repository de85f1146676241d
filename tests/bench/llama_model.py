"""A GGUF file of random weights in the shapes of a model configuration, as llama-quantize makes Q4_0.

Q4_0 is 4.5 bits per weight: 32 columns under one fp16 scale. The embedding, which is also the head where
it is tied, is Q6_K (6.6 bits), routers and norms are fp32, all as in llama.cpp's own Q4_0 files. Blocks
repeat one random pattern: speed does not depend on the values. Needs the package gguf.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from engine.model_config import ModelConfig

_ARCHITECTURE = "ernie4_5-moe"
_Q4_BLOCK, _Q4_BYTES = 32, 18  # columns; fp16 scale and 16 bytes of nibbles
_Q6_BLOCK, _Q6_BYTES = 256, 210  # columns; 128 + 64 bytes of integers, 16 int8 scales, fp16 scale


def write_random_model(path: Path, model: ModelConfig) -> None:
    """Write the file; takes seconds and 4.5 bits per weight of disk."""
    import gguf

    logging.getLogger("gguf").setLevel(logging.WARNING)
    writer = gguf.GGUFWriter(path, _ARCHITECTURE)
    _add_header(writer, model)
    tensors = _Tensors(writer, gguf.GGMLQuantizationType)
    tensors.sixbit("token_embd.weight", model.vocab_size, model.hidden_size)
    tensors.norm("output_norm.weight", model.hidden_size)
    if not model.tie_word_embeddings:
        tensors.sixbit("output.weight", model.vocab_size, model.hidden_size)
    for layer in range(model.num_layers):
        _add_layer(tensors, model, layer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_header(writer: Any, model: ModelConfig) -> None:
    writer.add_block_count(model.num_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_vocab_size(model.vocab_size)
    writer.add_expert_count(model.num_experts)
    writer.add_expert_used_count(model.moe_top_k)
    writer.add_expert_feed_forward_length(model.moe_intermediate_sizes[0])
    writer.add_expert_shared_count(model.num_shared_experts or 0)
    writer.add_expert_shared_feed_forward_length(model.shared_intermediate_size)
    writer.add_interleave_moe_layer_step(1)
    writer.add_leading_dense_block_count(model.num_layers - len(model.moe_layers))
    writer.add_tokenizer_model("no_vocab")


def _add_layer(tensors: _Tensors, model: ModelConfig, layer: int) -> None:
    root, hidden = f"blk.{layer}", model.hidden_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    for name in ("attn_norm", "ffn_norm"):
        tensors.norm(f"{root}.{name}.weight", hidden)
    tensors.fourbit(f"{root}.attn_q.weight", queries, hidden)
    tensors.fourbit(f"{root}.attn_k.weight", keys, hidden)
    tensors.fourbit(f"{root}.attn_v.weight", keys, hidden)
    tensors.fourbit(f"{root}.attn_output.weight", hidden, queries)
    if not model.is_moe_layer(layer):
        _add_ffn(tensors, f"{root}.ffn_{{}}.weight", (model.intermediate_size, hidden))
        return
    tensors.plain(f"{root}.ffn_gate_inp.weight", model.num_experts, hidden)
    experts = (model.num_experts, model.moe_intermediate_sizes[0], hidden)
    _add_ffn(tensors, f"{root}.ffn_{{}}_exps.weight", experts)
    if model.shared_intermediate_size:
        _add_ffn(tensors, f"{root}.ffn_{{}}_shexp.weight", (model.shared_intermediate_size, hidden))


def _add_ffn(tensors: _Tensors, name: str, shape: tuple[int, ...]) -> None:
    *stack, width, hidden = shape
    for part in ("gate", "up"):
        tensors.fourbit(name.format(part), *stack, width, hidden)
    tensors.fourbit(name.format("down"), *stack, hidden, width)


class _Tensors:
    """Adds tensors of random content to a writer; equal shapes share memory until they are written."""

    def __init__(self, writer: Any, types: Any) -> None:
        self._writer, self._types = writer, types
        self._numpy = np.random.default_rng(0)
        self._made: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}

    def norm(self, name: str, size: int) -> None:
        self._writer.add_tensor(name, np.ones(size, np.float32))

    def plain(self, name: str, *shape: int) -> None:
        values = self._numpy.uniform(-1, 1, shape) * (3 / shape[-1]) ** 0.5
        self._writer.add_tensor(name, values.astype(np.float32))

    def fourbit(self, name: str, *shape: int) -> None:
        self._add(name, shape, self._types.Q4_0, self._q4_rows)

    def sixbit(self, name: str, *shape: int) -> None:
        self._add(name, shape, self._types.Q6_K, self._q6_rows)

    def _add(self, name: str, shape: tuple[int, ...], kind: Any, make: Any) -> None:
        key = (kind.name, shape)
        if key not in self._made:
            pattern = make(shape[-1])
            count = int(np.prod(shape[:-1]))
            rows = np.resize(pattern, (count, pattern.shape[1]))
            self._made[key] = rows.reshape(*shape[:-1], pattern.shape[1])
        self._writer.add_tensor(name, self._made[key], raw_dtype=kind)

    def _q4_rows(self, columns: int, rows: int = 251) -> np.ndarray:
        blocks = self._random(rows, columns // _Q4_BLOCK, _Q4_BYTES)
        blocks[..., :2] = _half((3 / columns) ** 0.5 / 8)
        return blocks.reshape(rows, -1)

    def _q6_rows(self, columns: int, rows: int = 251) -> np.ndarray:
        blocks = self._random(rows, columns // _Q6_BLOCK, _Q6_BYTES)
        blocks[..., 192:208] = 32  # int8 scales
        blocks[..., 208:] = _half((3 / columns) ** 0.5 / 32 / 32)
        return blocks.reshape(rows, -1)

    def _random(self, *shape: int) -> np.ndarray:
        return self._numpy.integers(0, 256, shape, dtype=np.uint8)


def _half(value: float) -> np.ndarray:
    """The two bytes of an fp16 number."""
    return np.frombuffer(np.float16(value).tobytes(), np.uint8)

"""What quantisation costs: errors per layer, and how far the model's answers move from the bf16 checkpoint's.

The reference and every variant run side by side, layer by layer, so that two layers are in memory and never
two models. Per layer:

    weights   |W~ - W| / |W| over all matrices that are quantised
    output    error of what the layer adds to the residual stream when fed as the reference: its own share
    stream    |h~ - h| / |h| of the residual stream behind the layer: all shares so far

and at the end, over all positions of the prompts, the divergence KL(reference || variant) of the next token
in nats, and how often both find the same token likeliest. Text only. Printing is quality_command.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import msgspec
import numpy as np

import cuda_ops
from cuda_ops import Weight
from engine.config import Quantization, ServerConfig
from engine.messages import Chunk, NewSequence, SamplingParams, StepPlan
from engine.model_config import ModelConfig
from workers.batch import Batch, build_batch
from workers.checkpoint import Checkpoint
from workers.checkpoint_inventory import LogicalTensor, model_tensors
from workers.device.base import Device, Tensor
from workers.device.bfloat16 import float32_from_bits
from workers.kv_cache import KvCache
from workers.loader import LayerByLayer
from workers.model.attention import Attention
from workers.model.context import Context
from workers.model.mlp import Mlp
from workers.model.rope import Rope
from workers.model.weights import LayerWeights
from workers.model.workspace import Workspace
from workers.parallel import share_of
from workers.quant import Format, activation_dtype, format_of
from workers.sequences import Sequences
from workers.shards import Part, part_of
from workers.weight_source import CheckpointSource

PER_CHANNEL = "wint4 per channel"  # one int4 scale per output instead of one per group of 64 inputs
VARIANTS = ("wint8", "wint4", PER_CHANNEL, "wint4-all")
_BLOCK_SIZE = 64
_ROWS_AT_ONCE = 64  # of logits


@dataclass(frozen=True)
class LayerErrors:
    """Relative errors, root of squares over all elements."""

    weights: float
    output: float
    stream: float


@dataclass
class VariantQuality:
    name: str
    layers: list[LayerErrors] = field(default_factory=list)
    kl: float = 0.0  # mean over positions, nats
    kl_worst: float = 0.0  # of the worst position
    top1: float = 0.0  # share of positions


class PerChannelSource(CheckpointSource):
    """As CheckpointSource, with int4 scales that span all inputs, repeated for every group."""

    def fill(self, tensor: LogicalTensor, part: Part, weight: Weight) -> None:
        if weight.kind != "int4":
            super().fill(tensor, part, weight)
            return
        rows, inputs = part.shape
        scales = self._device.empty((rows, 1), "bfloat16")
        super().fill(tensor, part, Weight("int4", weight.data, scales, inputs))
        assert weight.scales is not None
        self._device.write(weight.scales, np.repeat(self._device.download(scales), inputs // weight.group, 1))


def measure(
    folder: str,
    model: ModelConfig,
    device: Device,
    prompts: Sequence[list[int]],
    variants: Sequence[str] = VARIANTS,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> list[VariantQuality]:
    """Run prompts of token ids through a checkpoint and its variants. Raises ConfigError as loading does."""
    streams = [_Stream(folder, model, device, prompts, name) for name in ("bfloat16", *variants)]
    reference, others = streams[0], streams[1:]
    found = [VariantQuality(name) for name in variants]
    checkpoint = Checkpoint(folder, model)
    try:
        for layer in range(checkpoint.model.num_layers):
            on_layer(layer)
            before = reference.hidden()
            added = reference.advance(layer)
            for stream, quality in zip(others, found, strict=True):
                weights = weight_error(checkpoint, device, layer, stream.name)
                own = stream.try_layer(layer, before)
                stream.advance(layer)
                error = LayerErrors(
                    weights, _relative(own, added), _relative(stream.hidden(), reference.hidden())
                )
                quality.layers.append(error)
            for stream in streams:
                stream.forget_layer()
        for stream, quality in zip(others, found, strict=True):
            _compare_answers(reference, stream, quality)
    finally:
        checkpoint.close()
        for stream in streams:
            stream.close()
    return found


class _Stream:
    """One format's way through the layers, with all prompts in one batch."""

    def __init__(
        self, folder: str, model: ModelConfig, device: Device, prompts: Sequence[list[int]], name: str
    ) -> None:
        self.name = name
        self._device = device
        checkpoint = Checkpoint(folder, model)
        kind = PerChannelSource if name == PER_CHANNEL else CheckpointSource
        config = ServerConfig(model=folder, quantization=_quantization(name))
        self._parts = LayerByLayer(config, checkpoint.model, kind(checkpoint, device), device)
        dtype = activation_dtype(config, model)
        share = share_of(model, 0, 1)
        self._context = Context(device, model, share, dtype, Workspace(device))
        self._batch, num_blocks = _one_batch(prompts, model, device)
        self._cos_sin = Rope(self._context).angles(self._batch.positions)
        one_layer = msgspec.structs.replace(model, num_layers=1)
        self._kv = KvCache.allocate(device, one_layer, share, dtype, num_blocks, _BLOCK_SIZE)
        self._attention, self._mlp = Attention(self._context), Mlp(self._context)
        embedding, self._norm, self._head = self._parts.ends()
        self._residual = device.empty((self._batch.num_tokens, model.hidden_size), dtype)
        cuda_ops.embed_tokens(self._batch.token_ids, embedding, 0, self._residual)
        self._layer: LayerWeights | None = None

    def hidden(self) -> np.ndarray:
        """The residual stream [M, H] fp32."""
        return self._device.download(self._residual)

    def advance(self, layer: int) -> np.ndarray:
        """Run the layer on the stream; returns what it added, fp32."""
        before = self.hidden()
        self._run(self._weights(layer), self._residual)
        return self.hidden() - before

    def try_layer(self, layer: int, hidden: np.ndarray) -> np.ndarray:
        """What the layer would add to `hidden`, fp32."""
        residual = self._device.upload(hidden, self._context.dtype)
        self._run(self._weights(layer), residual)
        return self._device.download(residual) - hidden

    def forget_layer(self) -> None:
        self._layer = None

    def log_probabilities(self, rows: slice) -> np.ndarray:
        """Of the next token after some positions: [rows, V] fp64."""
        context, part = self._context, self._residual[rows.start : rows.stop]
        normed = context.take("quality.normed", *part.shape)
        cuda_ops.rms_norm(part, self._norm, context.model.rms_norm_eps, normed)
        logits = context.workspace.take("quality.logits", (part.shape[0], self._head.out_features), "float32")
        self._device.linear(normed, self._head, logits)
        values = self._device.download(logits)[:, : context.model.vocab_size].astype(np.float64)
        values -= values.max(axis=1, keepdims=True)
        return values - np.log(np.exp(values).sum(axis=1, keepdims=True))

    @property
    def num_tokens(self) -> int:
        return self._batch.num_tokens

    def close(self) -> None:
        self._parts.close()

    def _weights(self, layer: int) -> LayerWeights:
        if self._layer is None:
            self._layer = self._parts.layer(layer)
        return self._layer

    def _run(self, layer: LayerWeights, residual: Tensor) -> None:
        """residual += attention, then += feed-forward, as workers/model/decoder.py does it."""
        context, eps = self._context, self._context.model.rms_norm_eps
        x, out = context.take("quality.x", *residual.shape), context.take("quality.out", *residual.shape)
        cuda_ops.rms_norm(residual, layer.input_norm, eps, x)
        self._attention.run(layer, x, self._batch, self._cos_sin, self._kv.layers[0], out)
        cuda_ops.add_rms_norm(out, residual, layer.post_attention_norm, eps, x)
        self._mlp.run(layer.mlp, x, self._batch.token_types, out)
        self._device.add(residual, out)


def weight_error(checkpoint: Checkpoint, device: Device, layer: int, variant: str) -> float:
    """Relative error of the layer's quantised matrices, all together; 0 when none is quantised."""
    squares = total = 0.0
    for matrix, form in _quantised_matrices(checkpoint, layer, variant):
        difference = rounded(device, matrix, form) - matrix
        squares += float(np.vdot(difference, difference))
        total += float(np.vdot(matrix, matrix))
    return float(np.sqrt(squares / total)) if total else 0.0


def rounded(device: Device, matrix: np.ndarray, form: Format) -> np.ndarray:
    """A [N, K] fp32 matrix after the round trip through int8 or int4."""
    rows, inputs = matrix.shape
    source = device.upload(matrix)
    if form.kind == "int8":
        data, scales = device.empty((rows, inputs), "int8"), device.empty((rows,), "bfloat16")
        cuda_ops.quantize_int8(source, data, scales)
        return device.download(data).astype(np.float32) * device.download(scales)[:, None]
    data = device.empty((rows, inputs // 2), "uint8")
    scales = device.empty((rows, inputs // form.group), "bfloat16")
    cuda_ops.quantize_int4(source, form.group, data, scales)
    packed = device.download(data)
    pairs = np.stack([packed & 15, packed >> 4], axis=-1).astype(np.int8)
    integers = np.where(pairs > 7, pairs - 16, pairs).reshape(rows, -1, form.group)
    return (integers * device.download(scales)[..., None]).astype(np.float32).reshape(rows, inputs)


def _quantised_matrices(
    checkpoint: Checkpoint, layer: int, variant: str
) -> Iterator[tuple[np.ndarray, Format]]:
    model = checkpoint.model
    share = share_of(model, 0, 1)
    for tensor in model_tensors(model):
        if not tensor.name.startswith(f"layers.{layer}.") or not tensor.is_linear:
            continue
        inputs = tensor.shape[1]
        form = format_of(tensor.role, inputs, _quantization(variant), model.dtype, bool(model.num_experts))
        if form.kind not in ("int8", "int4"):
            continue
        if form.kind == "int4" and variant == PER_CHANNEL:
            form = Format("int4", inputs)
        values = checkpoint.read(tensor, part_of(tensor, model, share))
        yield (float32_from_bits(values) if values.dtype == np.uint16 else values), form


def _quantization(variant: str) -> Quantization:
    return "wint4" if variant == PER_CHANNEL else cast(Quantization, variant)


def _one_batch(prompts: Sequence[list[int]], model: ModelConfig, device: Device) -> tuple[Batch, int]:
    """All prompts as chunks of one step, and how many KV blocks they take."""
    sequences, chunks, news, next_block = Sequences(), [], [], 0
    for index, tokens in enumerate(prompts):
        count = -(-len(tokens) // _BLOCK_SIZE)
        blocks = list(range(next_block, next_block + count))
        next_block += count
        news.append(NewSequence(index, tokens, len(tokens), SamplingParams(max_tokens=1)))
        chunks.append(Chunk(index, len(tokens), blocks, False))
    sequences.apply(StepPlan(0, chunks, news))
    live = [sequences[chunk.seq_id] for chunk in chunks]
    host = build_batch(chunks, live, _BLOCK_SIZE, model.image_patch_id, model.num_pools)
    return Batch.upload(host, device), next_block


def _compare_answers(reference: _Stream, stream: _Stream, quality: VariantQuality) -> None:
    divergences, agreements = [], []
    for start in range(0, reference.num_tokens, _ROWS_AT_ONCE):
        rows = slice(start, min(start + _ROWS_AT_ONCE, reference.num_tokens))
        expected, found = reference.log_probabilities(rows), stream.log_probabilities(rows)
        divergences.append((np.exp(expected) * (expected - found)).sum(axis=1))
        agreements.append(expected.argmax(axis=1) == found.argmax(axis=1))
    divergence = np.concatenate(divergences)
    quality.kl, quality.kl_worst = float(divergence.mean()), float(divergence.max())
    quality.top1 = float(np.concatenate(agreements).mean())


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found - expected)) / size if size else 0.0

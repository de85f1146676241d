"""Builds the ModelWeights of one rank: which buffers, in which format, filled from which tensor.

Every buffer has its final format from the start; a stack of experts is filled one expert at a time, several
matrices at once by as many threads. Where the numbers come from is in weight_source.py, which part a rank
needs in shards.py, which format in quant.py, what the fields mean in model/weights.py, how a second start
avoids all this in weight_cache.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import msgspec
import numpy as np

import cuda_ops
from cuda_ops import Weight
from engine.config import ServerConfig
from engine.model_config import ModelConfig, effective_quantization
from workers.checkpoint import Checkpoint
from workers.checkpoint_inventory import LogicalTensor, model_tensors
from workers.cores import usable_cores
from workers.device.base import Device, DtypeName, Tensor
from workers.device.bfloat16 import float32_from_bits
from workers.lasting_memory import lasting
from workers.loading_crew import LoadedBytes, LoadingCrew, Progress
from workers.model.weights import (
    DecoderWeights,
    DenseWeights,
    LayerWeights,
    ModelWeights,
    MoeWeights,
    ResamplerWeights,
    VisionBlockWeights,
    VisionWeights,
)
from workers.parallel import Share, share_of
from workers.quant import Format, activation_dtype, format_of, head_format
from workers.shards import Part, part_of
from workers.weight_cache import WeightCache
from workers.weight_cache_key import cache_key
from workers.weight_source import CheckpointSource, DummySource, WeightSource, quantise, write


def load_weights(
    config: ServerConfig,
    model: ModelConfig,
    device: Device,
    rank: int,
    world: int,
    on_progress: Progress = lambda loaded, total: None,
) -> ModelWeights:
    """The weights of rank `rank` of `world`: mapped from the weight cache, or read, cut and quantised.

    `on_progress` is called after every tensor, by one thread at a time; the last call has loaded == total.
    Raises ConfigError when the checkpoint does not hold exactly what `model` asks for, or when the ranks or
    groups do not divide it.
    """
    config = msgspec.structs.replace(config, quantization=effective_quantization(model, config.quantization))
    share = share_of(model, rank, world)
    folder = config.weight_cache
    if folder in ("", "off"):
        return _build(config, model, device, share, on_progress)
    cache = WeightCache(Path(folder), config.weight_cache_size, threads_for_loading(config))
    key = cache_key(config, model, device.name, rank, world)
    if (cached := cache.load(key, device, on_progress)) is not None:
        return cached
    weights = _build(config, model, device, share, on_progress)
    about = {"model": config.model, "quantization": config.quantization, "rank": rank, "world": world}
    if device.is_gpu:  # at once: tiling.py is going to replace the weights
        cache.store(key, weights, device, about)
    else:
        cache.store_in_background(key, weights, device, about)
    return weights


def threads_for_loading(config: ServerConfig) -> int:
    """What `--load-threads` says; else this rank's share of the cores, at least two."""
    share = len(usable_cores()) // config.tensor_parallel_size
    return config.load_threads or min(max(share, 2), 8)


class LayerByLayer:
    """The parts of a whole decoder one at a time, for who cannot hold them all; close() it at the end."""

    def __init__(
        self, config: ServerConfig, model: ModelConfig, source: WeightSource, device: Device
    ) -> None:
        self._source = source
        self._crew = LoadingCrew(threads_for_loading(config))
        share = share_of(model, 0, 1)
        self._builder = _Builder(config, source, device, share, lambda loaded, total: None, self._crew)

    def layer(self, index: int) -> LayerWeights:
        weights = self._builder._layer(index)
        self._crew.finish()
        return weights

    def ends(self) -> tuple[Tensor, Tensor, Weight]:
        """Embedding, last norm, head."""
        ends = self._builder._ends()
        self._crew.finish()
        return ends

    def close(self) -> None:
        self._crew.__exit__()
        self._source.close()


def _build(
    config: ServerConfig, model: ModelConfig, device: Device, share: Share, on_progress: Progress
) -> ModelWeights:
    source = _open_source(config, model, device)
    try:
        with LoadingCrew(threads_for_loading(config)) as crew:
            weights = _Builder(config, source, device, share, on_progress, crew).build()
            crew.finish()
            return weights
    finally:
        source.close()


def _open_source(config: ServerConfig, model: ModelConfig, device: Device) -> WeightSource:
    if config.load_format == "dummy":
        return DummySource(model, device, activation_dtype(config, model), config.seed)
    overrides = config.config_overrides
    is_cut = "num_hidden_layers" in overrides or "depth" in (overrides.get("vision_config") or {})
    return CheckpointSource(Checkpoint(config.model, model, is_cut=is_cut), device)


class _Builder:
    """Walks the structure of the model once; each verb makes one field."""

    def __init__(
        self,
        config: ServerConfig,
        source: WeightSource,
        device: Device,
        share: Share,
        on_progress: Progress,
        crew: LoadingCrew,
    ) -> None:
        self._source, self._device, self._share, self._crew = source, device, share, crew
        self._model = source.model
        self._dtype = activation_dtype(config, self._model)
        self._quantization = config.quantization
        self._tensors = {tensor.name: tensor for tensor in model_tensors(self._model)}
        parts = ((tensor, self._part(tensor)) for tensor in self._tensors.values())
        self._progress = LoadedBytes(sum(source.num_bytes(*pair) for pair in parts), on_progress)

    def build(self) -> ModelWeights:
        decoder = self._decoder()
        if self._model.vision is None:
            return ModelWeights(decoder)
        return ModelWeights(decoder, self._vision(self._model.vision.depth), self._resampler())

    # the decoder --------------------------------------------------------------------------------------

    def _decoder(self) -> DecoderWeights:
        embedding, norm, head = self._ends()
        return DecoderWeights(
            embedding, head, norm, [self._layer(layer) for layer in range(self._model.num_layers)]
        )

    def _ends(self) -> tuple[Tensor, Tensor, Weight]:
        """Embedding, last norm, head."""
        hidden, is_gpu = self._model.hidden_size, self._device.is_gpu
        form = head_format(self._quantization, self._dtype, hidden, is_gpu)
        is_tied, is_plain = self._model.tie_word_embeddings, form.kind == self._dtype
        head = None if is_plain else self._allocate(form, (len(self._share.vocab), hidden))
        embedding = self._vocab_rows("embed_tokens.weight", head if is_tied else None)
        rows = embedding if is_tied else self._vocab_rows("lm_head.weight", head)
        norm = self._vector("norm.weight")
        return embedding, norm, Weight(self._dtype, rows) if head is None else self._as_kept(head)

    def _layer(self, layer: int) -> LayerWeights:
        root = f"layers.{layer}"
        is_moe = self._model.is_moe_layer(layer)
        return LayerWeights(
            input_norm=self._vector(f"{root}.input_layernorm.weight"),
            post_attention_norm=self._vector(f"{root}.post_attention_layernorm.weight"),
            qkv=self._linear(f"{root}.self_attn.qkv_proj.weight"),
            o_proj=self._linear(f"{root}.self_attn.o_proj.weight"),
            mlp=self._moe(f"{root}.mlp") if is_moe else self._dense(f"{root}.mlp"),
        )

    def _dense(self, root: str) -> DenseWeights:
        return DenseWeights(
            self._linear(f"{root}.up_gate_proj.weight"), self._linear(f"{root}.down_proj.weight")
        )

    def _moe(self, root: str) -> MoeWeights:
        count = self._model.num_experts
        routers = [f"{root}.gate.weight", f"{root}.gate.weight_1"][: self._model.num_pools]
        pools = []
        for first in range(0, self._model.num_pools * count, count):
            experts = [f"{root}.experts.{expert}" for expert in range(first, first + count)]
            up = self._stack([f"{expert}.up_gate_proj.weight" for expert in experts])
            pools.append((up, self._stack([f"{expert}.down_proj.weight" for expert in experts])))
        has_shared = bool(self._model.shared_intermediate_size)
        return MoeWeights(
            router=self._routers(routers),
            bias=self._vector(f"{root}.moe_statics.e_score_correction_bias", "float32"),
            pools=pools,
            shared=self._dense(f"{root}.shared_experts") if has_shared else None,
        )

    def _routers(self, names: Sequence[str]) -> Tensor:
        """[P, experts, hidden] fp32 from [hidden, experts] per pool."""
        routers = [_as_float32(self._values(name)).T for name in names]
        return self._device.upload(np.ascontiguousarray(np.stack(routers)), "float32")

    # vision -------------------------------------------------------------------------------------------

    def _vision(self, depth: int) -> VisionWeights:
        return VisionWeights(
            patch_embed=self._linear("vision_model.patch_embed.proj.weight"),
            blocks=[self._vision_block(f"vision_model.blocks.{block}") for block in range(depth)],
            ln_w=self._vector("vision_model.ln.weight"),
            ln_b=self._vector("vision_model.ln.bias"),
        )

    def _vision_block(self, root: str) -> VisionBlockWeights:
        return VisionBlockWeights(
            norm1_w=self._vector(f"{root}.norm1.weight"),
            norm1_b=self._vector(f"{root}.norm1.bias"),
            qkv=self._linear(f"{root}.attn.qkv.weight"),
            qkv_b=self._vector(f"{root}.attn.qkv.bias"),
            proj=self._linear(f"{root}.attn.proj.weight"),
            proj_b=self._vector(f"{root}.attn.proj.bias"),
            norm2_w=self._vector(f"{root}.norm2.weight"),
            norm2_b=self._vector(f"{root}.norm2.bias"),
            fc1=self._linear(f"{root}.mlp.fc1.weight"),
            fc1_b=self._vector(f"{root}.mlp.fc1.bias"),
            fc2=self._linear(f"{root}.mlp.fc2.weight"),
            fc2_b=self._vector(f"{root}.mlp.fc2.bias"),
        )

    def _resampler(self) -> ResamplerWeights:
        spatial, temporal = "resampler_model.spatial_linear", "resampler_model.temporal_linear"
        return ResamplerWeights(
            spatial_0=self._linear(f"{spatial}.0.weight"),
            spatial_0_b=self._vector(f"{spatial}.0.bias"),
            spatial_2=self._linear(f"{spatial}.2.weight"),
            spatial_2_b=self._vector(f"{spatial}.2.bias"),
            spatial_ln_w=self._vector(f"{spatial}.3.weight"),
            spatial_ln_b=self._vector(f"{spatial}.3.bias"),
            temporal_0=self._linear(f"{temporal}.0.weight"),
            temporal_0_b=self._vector(f"{temporal}.0.bias"),
            temporal_2=self._linear(f"{temporal}.2.weight"),
            temporal_2_b=self._vector(f"{temporal}.2.bias"),
            temporal_ln_w=self._vector(f"{temporal}.3.weight"),
            temporal_ln_b=self._vector(f"{temporal}.3.bias"),
            mlp=self._linear("resampler_model.mlp.weight"),
            mlp_b=self._vector("resampler_model.mlp.bias"),
            after_norm=self._vector("resampler_model.after_norm.weight"),
        )

    # single fields ------------------------------------------------------------------------------------

    def _linear(self, name: str) -> Weight:
        tensor = self._tensors[name]
        weight = self._allocate(self._format(tensor), self._part(tensor).shape)
        self._fill(tensor, weight)
        return self._as_kept(weight)

    def _stack(self, names: Sequence[str]) -> Weight:
        """Equal matrices stacked into one weight of shape [len(names), N, K]."""
        first = self._tensors[names[0]]
        stack = self._allocate(self._format(first), (len(names), *self._part(first).shape))
        for index, name in enumerate(names):
            self._fill(self._tensors[name], self._entry(stack, index))
        return self._as_kept(stack)

    def _vocab_rows(self, name: str, quantised: Weight | None = None) -> Tensor:
        """[V_local, H], and in `quantised` where that is given; rows that pad the vocabulary are 0."""
        tensor = self._tensors[name]
        part = self._part(tensor)
        shape = len(self._share.vocab), self._model.hidden_size
        is_padded = part.num_rows < shape[0]
        rows = (
            self._device.zeros(shape, self._dtype) if is_padded else lasting(self._device, shape, self._dtype)
        )

        def make_head() -> None:
            if quantised is not None:
                quantise(rows, quantised)
                self._pack(quantised)

        if part.num_rows:
            self._fill(tensor, Weight(self._dtype, rows[: part.num_rows]), make_head)
        else:
            make_head()
        return rows

    def _vector(self, name: str, dtype: DtypeName | None = None) -> Tensor:
        values = self._values(name)
        target = self._device.empty(values.shape, dtype or self._dtype)
        write(self._device, target, values, dtype or self._dtype)
        return target

    def _values(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        values = self._source.values(tensor, self._part(tensor))
        self._count(tensor)
        return values

    def _fill(self, tensor: LogicalTensor, weight: Weight, then: Callable[[], None] = lambda: None) -> None:
        def job() -> None:
            self._source.fill(tensor, self._part(tensor), weight)
            self._pack(weight)
            then()
            self._count(tensor)

        self._source.announce(tensor, self._part(tensor))
        self._crew.start(job)

    def _count(self, tensor: LogicalTensor) -> None:
        self._progress.add(self._source.num_bytes(tensor, self._part(tensor)))

    def _part(self, tensor: LogicalTensor) -> Part:
        return part_of(tensor, self._model, self._share)

    def _format(self, tensor: LogicalTensor) -> Format:
        in_features = self._part(tensor).shape[1]
        is_moe = bool(self._model.num_experts)
        return format_of(tensor.role, in_features, self._quantization, self._dtype, is_moe)

    def _allocate(self, form: Format, shape: tuple[int, ...]) -> Weight:
        *lead, inputs = shape
        if form.kind == "int8":
            scales = lasting(self._device, lead, "bfloat16")
            return Weight("int8", lasting(self._device, shape, "int8"), scales)
        if form.kind == "int4":
            scales = lasting(self._device, (*lead, inputs // form.group), "bfloat16")
            data = lasting(self._device, (*lead, inputs // 2), "uint8")
            return Weight("int4", data, scales, form.group)
        return Weight(form.kind, lasting(self._device, shape, cast(DtypeName, form.kind)))

    def _entry(self, stack: Weight, index: int) -> Weight:
        """One matrix of a stack, sharing its memory."""
        scales = None if stack.scales is None else self._row(stack.scales, index)
        return Weight(stack.kind, self._row(stack.data, index), scales, stack.group)

    def _pack(self, weight: Weight) -> None:
        if self._is_packed(weight):
            cuda_ops.pack_panels(weight)

    def _as_kept(self, weight: Weight) -> Weight:
        """The weight as it will be once its parts are filled and packed."""
        return replace(weight, is_packed=self._is_packed(weight))

    def _is_packed(self, weight: Weight) -> bool:
        """The CPU multiplies bf16 with packed weights; a GPU has an order of its own."""
        if self._device.is_gpu or self._dtype != "bfloat16":
            return False
        return cuda_ops.can_pack(weight.kind, weight.out_features, weight.in_features, weight.group)

    def _row(self, tensor: Tensor, index: int) -> Tensor:
        return self._device.view(tensor[index : index + 1], tuple(tensor.shape[1:]))


def _as_float32(values: np.ndarray) -> np.ndarray:
    return float32_from_bits(values) if values.dtype == np.uint16 else values

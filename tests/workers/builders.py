"""The smallest worlds for the workers' tests: configs, random weights, prompts with media on disk.

Weights are made whole, as NumPy arrays by plain names, so that tests/workers/reference.py can use them
directly; `place_weights` cuts one rank's share from them, independently of workers/loader.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import cuda_ops
from engine.messages import MediaItem
from engine.model_config import ModelConfig, VisionConfig
from tests.conftest import Rand
from workers.device.base import Device
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
from workers.parallel import share_of

Grid = tuple[int, int, int]
RawWeights = dict[str, np.ndarray]

TINY = ModelConfig(
    family="vl",
    hidden_size=64,
    num_layers=3,
    num_heads=8,
    num_kv_heads=8,
    head_dim=16,
    intermediate_size=96,
    vocab_size=320,
    max_position_embeddings=4096,
    rope_theta=500000.0,
    time_frequencies=2,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    num_experts=4,
    moe_intermediate_sizes=(32, 16),
    moe_layers=(1, 2),
    moe_top_k=2,
    moe_norm_min=1e-12,
    num_shared_experts=0,
    dtype="float32",
    image_patch_id=300,
    image_start_id=301,
    image_end_id=302,
    video_start_id=303,
    video_end_id=304,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_ids=(2,),
    vision=VisionConfig(depth=2, hidden_size=32, num_heads=2, intermediate_size=64),
)


def make_tiny_config(**changes: Any) -> ModelConfig:
    """A VL model with both pools and a vision tower, small enough for milliseconds per step."""
    return msgspec.structs.replace(TINY, **changes)


def make_text_config(**changes: Any) -> ModelConfig:
    """A text model with one pool of experts."""
    text = {"family": "text", "time_frequencies": 0, "moe_intermediate_sizes": (32,), "vision": None}
    markers = dict.fromkeys(("image_start_id", "image_end_id", "video_start_id", "video_end_id"), -1)
    return make_tiny_config(**{**text, **markers, "image_patch_id": TINY.vocab_size, **changes})


def make_dense_config(**changes: Any) -> ModelConfig:
    """A text model without experts, whose head_dim is not hidden_size / num_heads."""
    dense = {"num_experts": 0, "moe_intermediate_sizes": (), "moe_layers": (), "moe_top_k": 0}
    return make_text_config(**{**dense, "num_shared_experts": None, **changes})


# weights ------------------------------------------------------------------------------------------------


def make_raw_weights(config: ModelConfig, rand: Rand) -> RawWeights:
    """All matrices [out, in], fp32; scales keep activations around one."""
    raw: RawWeights = {}
    hidden, hd = config.hidden_size, config.head_dim

    def matrix(name: str, *shape: int) -> None:
        raw[name] = rand.normal(*shape, scale=shape[-1] ** -0.5)

    def norm(name: str, size: int, *, with_bias: bool = False) -> None:
        raw[name] = 1 + rand.normal(size, scale=0.1)
        if with_bias:
            raw[f"{name}.bias"] = rand.normal(size, scale=0.05)

    matrix("embed", config.vocab_size, hidden)
    raw["embed"] *= 4
    matrix("head", config.vocab_size, hidden)
    norm("norm", hidden)
    for i in range(config.num_layers):
        norm(f"{i}.input_norm", hidden)
        norm(f"{i}.post_norm", hidden)
        matrix(f"{i}.q", config.num_heads * hd, hidden)
        matrix(f"{i}.k", config.num_kv_heads * hd, hidden)
        matrix(f"{i}.v", config.num_kv_heads * hd, hidden)
        matrix(f"{i}.o", hidden, config.num_heads * hd)
        _add_mlp(raw, matrix, config, i, rand)
    if config.vision is not None:
        _add_vision(raw, matrix, norm, config, rand)
    return raw


def _add_mlp(raw: RawWeights, matrix: Any, config: ModelConfig, layer: int, rand: Rand) -> None:
    def swiglu(name: str, width: int, *lead: int) -> None:
        matrix(f"{name}.gate", *lead, width, config.hidden_size)
        matrix(f"{name}.up", *lead, width, config.hidden_size)
        matrix(f"{name}.down", *lead, config.hidden_size, width)

    if not config.is_moe_layer(layer):
        swiglu(f"{layer}.mlp", config.intermediate_size)
        return
    matrix(f"{layer}.router", config.num_pools, config.num_experts, config.hidden_size)
    raw[f"{layer}.bias"] = rand.normal(config.num_pools, config.num_experts, scale=0.05)
    for pool, width in enumerate(config.moe_intermediate_sizes):
        swiglu(f"{layer}.pool{pool}", width, config.num_experts)
    if config.num_shared_experts:
        swiglu(f"{layer}.shared", config.num_shared_experts * config.moe_intermediate_sizes[0])


def _add_vision(raw: RawWeights, matrix: Any, norm: Any, config: ModelConfig, rand: Rand) -> None:
    vision = config.vision
    assert vision is not None
    width, window = vision.hidden_size, 4 * vision.hidden_size

    def linear(name: str, outputs: int, inputs: int) -> None:
        matrix(name, outputs, inputs)
        raw[f"{name}.bias"] = rand.normal(outputs, scale=0.05)

    matrix("patch_embed", width, vision.patch_features)
    for i in range(vision.depth):
        norm(f"vision{i}.norm1", width, with_bias=True)
        norm(f"vision{i}.norm2", width, with_bias=True)
        linear(f"vision{i}.qkv", 3 * width, width)
        linear(f"vision{i}.proj", width, width)
        linear(f"vision{i}.fc1", vision.intermediate_size, width)
        linear(f"vision{i}.fc2", width, vision.intermediate_size)
    norm("vision.ln", width, with_bias=True)
    for name, inputs in (("spatial", window), ("temporal", 2 * window)):
        linear(f"{name}0", window, inputs)
        linear(f"{name}2", window, window)
        norm(f"{name}.ln", window, with_bias=True)
    linear("resampler.mlp", config.hidden_size, window)
    norm("after_norm", config.hidden_size)


def place_weights(raw: RawWeights, config: ModelConfig, device: Device, dtype: str = "") -> ModelWeights:
    """The share of `device.rank`, uploaded as `dtype` (the config's if empty)."""
    return _Placing(raw, config, device, dtype or config.dtype).model()


class _Placing:
    """Cuts and uploads; each method makes one dataclass of workers/model/weights.py."""

    def __init__(self, raw: RawWeights, config: ModelConfig, device: Device, dtype: str) -> None:
        self.raw, self.config, self.device, self.dtype = raw, config, device, dtype
        self.share = share_of(config, device.rank, device.world)

    def tensor(self, array: np.ndarray) -> Any:
        return self.device.upload(np.ascontiguousarray(array), self.dtype)

    def weight(self, array: np.ndarray) -> cuda_ops.Weight:
        return cuda_ops.Weight(self.dtype, self.tensor(array))

    def model(self) -> ModelWeights:
        layers = [self.layer(i) for i in range(self.config.num_layers)]
        embed = self.tensor(self.vocabulary_rows("embed"))
        head = cuda_ops.Weight(self.dtype, embed)
        if not self.config.tie_word_embeddings:
            head = self.weight(self.vocabulary_rows("head"))
        decoder = DecoderWeights(embed, head, self.tensor(self.raw["norm"]), layers)
        if self.config.vision is None:
            return ModelWeights(decoder)
        return ModelWeights(decoder, self.vision(), self.resampler())

    def vocabulary_rows(self, name: str) -> np.ndarray:
        padded = np.zeros((self.share.padded_vocab_size, self.config.hidden_size), np.float32)
        padded[: self.config.vocab_size] = self.raw[name]
        return padded[self.share.vocab.start : self.share.vocab.stop]

    def layer(self, i: int) -> LayerWeights:
        hd = self.config.head_dim
        q = slice(self.share.q_heads.start * hd, self.share.q_heads.stop * hd)
        kv = slice(self.share.kv_heads.start * hd, self.share.kv_heads.stop * hd)
        qkv = [self.raw[f"{i}.q"][q], self.raw[f"{i}.k"][kv], self.raw[f"{i}.v"][kv]]
        return LayerWeights(
            input_norm=self.tensor(self.raw[f"{i}.input_norm"]),
            post_attention_norm=self.tensor(self.raw[f"{i}.post_norm"]),
            qkv=self.weight(np.concatenate(qkv)),
            o_proj=self.weight(self.raw[f"{i}.o"][:, q]),
            mlp=self.moe(i) if self.config.is_moe_layer(i) else self.dense(f"{i}.mlp"),
        )

    def swiglu(self, name: str) -> tuple[cuda_ops.Weight, cuda_ops.Weight]:
        gate, up, down = (self.raw[f"{name}.{part}"] for part in ("gate", "up", "down"))
        part = self.share.columns(gate.shape[-2])
        columns = slice(part.start, part.stop)
        up_gate = np.concatenate([gate[..., columns, :], up[..., columns, :]], axis=-2)
        return self.weight(up_gate), self.weight(down[..., columns])

    def dense(self, name: str) -> DenseWeights:
        return DenseWeights(*self.swiglu(name))

    def moe(self, i: int) -> MoeWeights:
        return MoeWeights(
            router=self.device.upload(self.raw[f"{i}.router"]),
            bias=self.device.upload(self.raw[f"{i}.bias"]),
            pools=[self.swiglu(f"{i}.pool{pool}") for pool in range(self.config.num_pools)],
            shared=self.dense(f"{i}.shared") if self.config.num_shared_experts else None,
        )

    def linear(self, name: str) -> tuple[cuda_ops.Weight, Any]:
        return self.weight(self.raw[name]), self.tensor(self.raw[f"{name}.bias"])

    def norm(self, name: str) -> tuple[Any, Any]:
        return self.tensor(self.raw[name]), self.tensor(self.raw[f"{name}.bias"])

    def vision(self) -> VisionWeights:
        assert self.config.vision is not None
        blocks = [
            VisionBlockWeights(
                *self.norm(f"vision{i}.norm1"),
                *self.linear(f"vision{i}.qkv"),
                *self.linear(f"vision{i}.proj"),
                *self.norm(f"vision{i}.norm2"),
                *self.linear(f"vision{i}.fc1"),
                *self.linear(f"vision{i}.fc2"),
            )
            for i in range(self.config.vision.depth)
        ]
        return VisionWeights(self.weight(self.raw["patch_embed"]), blocks, *self.norm("vision.ln"))

    def resampler(self) -> ResamplerWeights:
        return ResamplerWeights(
            *self.linear("spatial0"),
            *self.linear("spatial2"),
            *self.norm("spatial.ln"),
            *self.linear("temporal0"),
            *self.linear("temporal2"),
            *self.norm("temporal.ln"),
            *self.linear("resampler.mlp"),
            self.tensor(self.raw["after_norm"]),
        )


# prompts ------------------------------------------------------------------------------------------------


@dataclass
class Prompt:
    """Token ids and media of one request; `patches` are the same bytes as in the media's files."""

    token_ids: list[int] = field(default_factory=list)
    media: list[MediaItem] = field(default_factory=list)
    patches: list[np.ndarray] = field(default_factory=list)


def make_prompt(rand: Rand, config: ModelConfig, folder: Path, parts: list[int | Grid]) -> Prompt:
    """A prompt of parts in order: an int is so many text tokens, a grid is an image or (frames > 1) a video.

    Media stand between their start and end markers, as in chat prompts; their patches are random.
    """
    prompt = Prompt()
    for part in parts:
        if isinstance(part, int):
            prompt.token_ids += rand.numpy.integers(3, config.image_patch_id, part).tolist()
        else:
            _add_media(prompt, rand, config, folder, part)
    return prompt


def _add_media(prompt: Prompt, rand: Rand, config: ModelConfig, folder: Path, grid: Grid) -> None:
    is_video = grid[0] > 1
    start = config.video_start_id if is_video else config.image_start_id
    end = config.video_end_id if is_video else config.image_end_id
    num_patches = grid[0] * grid[1] * grid[2]
    num_tokens = num_patches // (8 if is_video else 4)
    patches = rand.numpy.integers(0, 256, (num_patches, 588), np.uint8)
    name = f"patches-{rand.numpy.integers(2**62):x}"
    patches.tofile(folder / name)
    prompt.token_ids.append(start)
    prompt.media.append(
        MediaItem(
            kind="video" if is_video else "image",
            content_hash=name,
            grid=grid,
            offset=len(prompt.token_ids),
            num_tokens=num_tokens,
            file=name,
        )
    )
    prompt.token_ids += [config.image_patch_id] * num_tokens + [end]
    prompt.patches.append(patches)

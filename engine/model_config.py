"""The model's own numbers, read from config.json into one frozen struct.

Accepts every spelling that published ERNIE-4.5 checkpoints use (Paddle keys, transformers' nested
`text_config`/`vision_config`, scalars or [text, vision] lists, nulls). Pure Python: the engine plans
memory with it, the api reads token ids from it, the workers build the model from it.
How the spellings become fields is in config_reader.py. Facts and sources: model specification sections
1.1 to 1.6.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.config import Quantization
from engine.errors import ConfigError


class VisionConfig(msgspec.Struct, frozen=True):
    """The vision transformer; its patches are patch_size x patch_size x in_channels."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    patch_size: int = 14
    in_channels: int = 3
    spatial_merge: int = 2
    temporal_merge: int = 2
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_features(self) -> int:
        return self.in_channels * self.patch_size**2

    @property
    def merged_size(self) -> int:
        """Width of one merge window: the resampler's spatial layers are this wide."""
        return self.hidden_size * self.spatial_merge**2


class ModelConfig(msgspec.Struct, frozen=True):
    """One decoder, with or without experts and a vision tower."""

    family: Literal["vl", "text"]
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # of the dense layers
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    time_frequencies: int  # freq_allocation; 0 for text models, whose rope has one axis
    rms_norm_eps: float
    tie_word_embeddings: bool | None  # None: decided by the presence of lm_head.weight
    num_experts: int  # per pool; 0 for a dense model
    moe_intermediate_sizes: tuple[int, ...]  # one width per pool: (text,) or (text, vision)
    moe_layers: tuple[int, ...]  # which layers have experts
    moe_top_k: int
    moe_norm_min: float
    num_shared_experts: int | None  # None: decided by the tensors
    dtype: Literal["bfloat16", "float32"]
    image_patch_id: int  # the placeholder of images and videos; ids >= it use the vision experts
    image_start_id: int  # the four marker ids are -1 in text models, image_patch_id is vocab_size there
    image_end_id: int
    video_start_id: int
    video_end_id: int
    pad_token_id: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    vision: VisionConfig | None
    quantization_config: dict[str, Any] | None = None
    has_correction_bias: bool = True  # false: experts are chosen by the unbiased probabilities

    @property
    def num_pools(self) -> int:
        return len(self.moe_intermediate_sizes) if self.num_experts else 0

    def is_moe_layer(self, layer: int) -> bool:
        return layer in self.moe_layers

    @property
    def qkv_size(self) -> int:
        """Rows of the fused projection: all Q heads, all K heads, all V heads."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the one MLP that the shared experts are fused into; 0 without shared experts."""
        if not self.num_experts or not self.num_shared_experts:
            return 0
        return self.num_shared_experts * self.moe_intermediate_sizes[0]


def parse_model_config(raw: dict[str, Any], overrides: dict[str, Any] | None = None) -> ModelConfig:
    """The fields of a decoded config.json, in any known spelling, after `overrides`.

    Raises ConfigError that names the key, both for a value that cannot be used and for an override
    that no known configuration has.
    """
    from engine.config_reader import build_model_config  # the reader needs the structs above

    return build_model_config(raw, overrides or {})


def read_model_config(source: str | Path, overrides: dict[str, Any] | None = None) -> ModelConfig:
    """Read `source`, a checkpoint folder or a config file, and what its generation config adds."""
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    raw = read_json_object(file)
    try:
        config = parse_model_config(raw, overrides)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    generation = file.with_name("generation_config.json")
    if not generation.is_file():
        return config
    more = read_json_object(generation).get("eos_token_id")
    return msgspec.structs.replace(config, eos_token_ids=_merge_ids(config.eos_token_ids, more, generation))


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON object in a file; ConfigError when it is absent, broken or not an object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist; point --model at a folder that holds it") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds a {type(value).__name__}, expected a JSON object")
    return value


def check_tensor_parallel(config: ModelConfig, world_size: int) -> None:
    """Raise ConfigError, naming every width that does not divide, unless `world_size` ranks can share it."""
    widths = {"num_attention_heads": config.num_heads}
    if len(config.moe_layers) < config.num_layers:
        widths["intermediate_size"] = config.intermediate_size
    for pool, width in enumerate(config.moe_intermediate_sizes if config.moe_layers else ()):
        widths[f"moe_intermediate_size[{pool}]"] = width
    if config.shared_intermediate_size:
        widths["shared experts' width"] = config.shared_intermediate_size

    def uneven(size: int) -> list[str]:
        kv = config.num_kv_heads
        misfits = [f"{name} = {width}" for name, width in widths.items() if width % size]
        return misfits + ([f"num_key_value_heads = {kv}"] if kv % size and size % kv else [])

    if misfits := uneven(world_size):
        fitting = ", ".join(str(size) for size in (1, 2, 4, 8, 16) if not uneven(size))
        raise ConfigError(
            f"--tensor-parallel-size {world_size} does not divide {', '.join(misfits)}; "
            f"sizes that do: {fitting}"
        )


def effective_quantization(model: ModelConfig, asked: Quantization) -> Quantization:
    """The format of the big weights: the checkpoint's own if it has one, else what was asked, else bfloat16.

    Raises ConfigError when both speak and differ, or when the checkpoint's is none that can be read.
    """
    stored = _stored_quantization(model.quantization_config)
    if stored is None:
        return "bfloat16" if asked == "auto" else asked
    if asked not in ("auto", stored):
        raise ConfigError(
            f"--quantization {asked} contradicts the checkpoint, which is quantised as {stored}; leave the "
            "flag out, or use the bf16 checkpoint"
        )
    return stored


def _stored_quantization(raw: dict[str, Any] | None) -> Literal["wint8", "wint4"] | None:
    """What quantization_config says, in the words of --quantization. Specification 8.4."""
    if not raw:
        return None
    name = raw.get("quantization") or raw.get("quant_method")
    types = {"all": name}
    if name == "mix_quant":
        moe = raw.get("moe_quant_type")
        types = {
            "dense": raw.get("dense_quant_type"),
            "moe": moe,
            "image": raw.get("image_moe_quant_type") or moe,
        }
    if not set(types.values()) <= {"wint8", "wint4"} or (name == "mix_quant" and types["dense"] != "wint8"):
        found = ", ".join(sorted({str(kind) for kind in types.values()}))
        raise ConfigError(
            f"quantization_config has {found}; Octet reads "
            "wint8, wint4 and their mix (dense_quant_type wint8). Use the bf16 checkpoint with --quantization"
        )
    if types.get("moe") != types.get("image"):
        raise ConfigError(
            "quantization_config quantises text and vision experts differently; use the bf16 checkpoint"
        )
    if raw.get("has_zero_point") or raw.get("is_channel_wise") is False:
        raise ConfigError("quantization_config is not symmetric per channel; use the bf16 checkpoint")
    if raw.get("is_permuted") is not False:
        raise ConfigError(
            "this checkpoint's weights are permuted for one GPU's kernels (quantization_config does not say "
            "is_permuted: false); use the bf16 checkpoint with --quantization wint8 or wint4"
        )
    return "wint4" if "wint4" in types.values() else "wint8"


def _merge_ids(ids: tuple[int, ...], more: Any, file: Path) -> tuple[int, ...]:
    """`ids`, then what `more` (null, an id or a list of ids) adds, each once and in order."""
    added = [] if more is None else more if isinstance(more, list) else [more]
    if not all(isinstance(i, int) for i in added):
        raise ConfigError(f"{file}: eos_token_id is {more!r}, expected an id or a list of ids")
    return tuple(dict.fromkeys((*ids, *added)))

"""From the keys of a config.json, in any published spelling, to the fields of ModelConfig.

Three steps: transformers' nested form is laid flat, overrides are merged in, and each field is read
with its type checked. Whatever Octet cannot compute faithfully (biases, another activation, a pool
without experts in a layer) is refused here, by name, and not found out later as bad text.
The structs are in model_config.py. Sources: model specification sections 1.1 to 1.4.
"""

from __future__ import annotations

import difflib
from typing import Any

from engine.errors import ConfigError
from engine.model_config import ModelConfig, VisionConfig

_VL_TYPES = ("ernie4_5_moe_vl", "ernie4_5_vl_moe")
_TEXT_TYPES = ("ernie4_5_moe", "ernie4_5")

# Ids of the published vocabulary, used when a config does not state its own.
_MEDIA_IDS = {
    "im_patch_id": 100295,
    "image_start_token_id": 101304,
    "image_end_token_id": 101305,
    "video_start_token_id": 101306,
    "video_end_token_id": 101307,
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What --config-overrides may set even where the checkpoint's config.json leaves it out.
_TEXT_KEYS = _words(
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
    "vocab_size max_position_embeddings rope_theta rope_parameters rope_scaling rope_3d freq_allocation "
    "rms_norm_eps hidden_act use_bias tie_word_embeddings compression_ratio moe_num_experts "
    "moe_intermediate_size moe_layer_start_index moe_layer_end_index moe_layer_interval mlp_layer_types "
    "moe_k moe_norm_min moe_num_shared_experts moe_use_aux_free moe_use_hard_gate dtype torch_dtype "
    "pad_token_id bos_token_id eos_token_id pixel_hidden_size spatial_conv_size temporal_conv_size "
    "use_temporal_conv im_patch_id image_start_token_id image_end_token_id video_start_token_id "
    "video_end_token_id vision_config quantization_config model_type"
)
_VISION_KEYS = _words(
    "depth embed_dim hidden_size num_heads mlp_ratio intermediate_size hidden_act patch_size in_channels "
    "in_chans spatial_merge_size temporal_merge_size rms_norm_eps layer_norm_eps rope_theta"
)

# Keys that say the same as the one that an override changes.
_OUTDATED_BY = {
    "dtype": ("torch_dtype",),
    "torch_dtype": ("dtype",),
    "im_patch_id": ("image_token_id",),
    "image_token_id": ("im_patch_id",),
    "moe_layer_start_index": ("mlp_layer_types",),
    "moe_layer_end_index": ("mlp_layer_types",),
    "moe_layer_interval": ("mlp_layer_types",),
    "hidden_size": ("embed_dim",),
    "embed_dim": ("hidden_size",),
    "mlp_ratio": ("intermediate_size",),
    "in_chans": ("in_channels",),
    "in_channels": ("in_chans",),
}


def build_model_config(raw: dict[str, Any], overrides: dict[str, Any]) -> ModelConfig:
    """Read every field; see model_config.parse_model_config for the errors."""
    keys = Keys(_merge_overrides(_lay_flat(raw), overrides))
    family = _read_family(keys)
    _refuse_unsupported(keys, family)
    hidden_size, num_heads = keys.positive("hidden_size"), keys.positive("num_attention_heads")
    head_dim = keys.positive("head_dim", hidden_size // num_heads)
    num_layers = keys.positive("num_hidden_layers")
    num_experts, widths, layers = _read_experts(keys, family, num_layers)
    vision = _read_vision(keys) if family == "vl" else None
    vocab_size = keys.positive("vocab_size")
    config = ModelConfig(
        family=family,  # type: ignore[arg-type]
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.positive("num_key_value_heads", num_heads),
        head_dim=head_dim,
        intermediate_size=keys.positive("intermediate_size"),
        vocab_size=vocab_size,
        max_position_embeddings=keys.positive("max_position_embeddings", 131072),
        rope_theta=_read_rope_theta(keys, 500000.0),
        time_frequencies=_read_time_frequencies(keys, head_dim) if family == "vl" else 0,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-5),
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        num_experts=num_experts,
        moe_intermediate_sizes=widths,
        moe_layers=layers,
        moe_top_k=keys.positive("moe_k") if num_experts else 0,
        moe_norm_min=keys.number("moe_norm_min", 1e-12),
        num_shared_experts=keys.integer("moe_num_shared_experts") if num_experts else 0,
        dtype=_read_dtype(keys),  # type: ignore[arg-type]
        **_read_media_ids(keys, family, vocab_size),
        pad_token_id=keys.integer("pad_token_id", 0) or 0,
        bos_token_id=keys.integer("bos_token_id", 1) or 0,
        eos_token_ids=keys.integers("eos_token_id", (2,)),
        vision=vision,
        quantization_config=keys.mapping("quantization_config") or None,
        has_correction_bias=keys.flag("moe_use_aux_free", True) is True,
    )
    _check_consistent(config)
    return config


class Keys:
    """Typed access to a decoded JSON object; every complaint names the key and shows the value.

    A key that is absent and a key that is null mean the same: the default, or an error without one.
    """

    _REQUIRED: Any = object()

    def __init__(self, values: dict[str, Any], prefix: str = "") -> None:
        self.values = values
        self._prefix = prefix

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def positive(self, key: str, default: int = _REQUIRED) -> int:
        value = self._get(key, default)
        if not _is_int(value) or value < 1:
            raise self.error(key, "a positive integer")
        return value

    def integer(self, key: str, default: int | None = None) -> int | None:
        value = self._get(key, default)
        if value is not None and not _is_int(value):
            raise self.error(key, "an integer")
        return value

    def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A scalar is a list of one."""
        value = self._get(key, list(default))
        items = value if isinstance(value, list) else [value]
        if not items or not all(_is_int(item) for item in items):
            raise self.error(key, "an integer or a list of integers")
        return tuple(items)

    def number(self, key: str, default: float) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.error(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool | None:
        value = self._get(key, default)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return value

    def section(self, key: str) -> Keys:
        return Keys(self.mapping(key), f"{self._prefix}{key}.")

    def per_pool(self, key: str, pools: int, default: int = _REQUIRED) -> tuple[int, ...]:
        """A scalar holds for every pool; a list has one entry per pool."""
        value = self._get(key, default)
        items = value if isinstance(value, list) else [value] * pools
        if len(items) != pools or not all(_is_int(item) for item in items):
            raise self.error(key, f"an integer or a list of {pools} integer{'s' * (pools > 1)}")
        return tuple(items)

    def error(self, key: str, expected: str) -> ConfigError:
        return ConfigError(f"{self._prefix}{key} is {self.values.get(key)!r}, expected {expected}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is Keys._REQUIRED:
            raise ConfigError(f"{self._prefix}{key} is missing")
        return default


def _lay_flat(raw: dict[str, Any]) -> dict[str, Any]:
    """transformers nests the decoder's keys in text_config and names the placeholder differently."""
    flat = dict(raw)
    text = flat.pop("text_config", None)
    if isinstance(text, dict):
        inner = {key: value for key, value in text.items() if key != "model_type" and value is not None}
        if flat.get("tie_word_embeddings") != text.get("tie_word_embeddings"):
            inner["tie_word_embeddings"] = None  # both levels have a default: let the tensors decide
        flat = {**flat, **inner}
    return flat


def _merge_overrides(flat: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`flat` with the operator's values on top; keys of vision_config merge one by one."""
    merged = _overlay(flat, overrides, _TEXT_KEYS, "")
    changes = overrides.get("vision_config")
    if isinstance(changes, dict):
        merged["vision_config"] = _overlay(
            flat.get("vision_config") or {}, changes, _VISION_KEYS, "vision_config."
        )
    return merged


def _overlay(
    values: dict[str, Any], changes: dict[str, Any], known: frozenset[str], prefix: str
) -> dict[str, Any]:
    """`values` with `changes`; another spelling of a changed key is removed, for it would win."""
    result = dict(values)
    for key, value in changes.items():
        _require_known(key, known | values.keys(), prefix)
        for other in _OUTDATED_BY.get(key, ()):
            if other not in changes:
                result.pop(other, None)
        result[key] = value
    return result


def _require_known(key: str, known: Any, prefix: str) -> None:
    if key in known:
        return
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
    raise ConfigError(f"--config-overrides: no key {prefix}{key}; the nearest is {prefix}{near[0]}")


def _read_family(keys: Keys) -> str:
    name = keys.values.get("model_type")
    if name in _VL_TYPES:
        return "vl"
    if name in _TEXT_TYPES:
        return "text"
    raise keys.error("model_type", f"one of {', '.join(_VL_TYPES + _TEXT_TYPES)}")


def _refuse_unsupported(keys: Keys, family: str) -> None:
    required: dict[str, Any] = {"hidden_act": "silu", "use_bias": False, "compression_ratio": 1.0}
    if family == "vl":
        required |= {"use_temporal_conv": True, "moe_use_hard_gate": True, "rope_3d": True}
    for key, value in required.items():
        if keys.has(key) and keys.values[key] != value:
            raise keys.error(key, f"{value!r}, the only value Octet supports")
    for name in ("rope_parameters", "rope_scaling"):
        section = keys.section(name)
        kind = "rope_type" if section.has("rope_type") else "type"
        if section.has(kind) and section.values[kind] != "default":
            raise section.error(kind, "'default', the only rope Octet supports")


def _read_rope_theta(keys: Keys, default: float) -> float:
    if keys.has("rope_theta"):
        return keys.number("rope_theta", default)
    return keys.section("rope_parameters").number("rope_theta", default)


def _read_time_frequencies(keys: Keys, head_dim: int) -> int:
    """How many rope frequencies follow time: freq_allocation, or the last entry of mrope_section."""
    sections = [keys.section(name) for name in ("rope_parameters", "rope_scaling")]
    split = next((section for section in sections if section.has("mrope_section")), None)
    stated = keys.integer("freq_allocation")
    if split is None:
        time = 20 if stated is None else stated
    else:
        rows, columns, time = split.per_pool("mrope_section", 3)
        if rows != columns or rows + columns + time != head_dim // 2:
            raise split.error("mrope_section", f"[h, w, t] with h = w and a sum of {head_dim // 2}")
        if stated is not None and stated != time:
            raise keys.error("freq_allocation", f"{time} as in mrope_section")
    if not 0 < time <= head_dim // 2 or (head_dim // 2 - time) % 2:
        raise ConfigError(f"freq_allocation is {time}, expected 1 to {head_dim // 2} with an even rest")
    return time


def _read_experts(keys: Keys, family: str, num_layers: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Experts per pool, width of each pool, and the layers that have experts."""
    pools = 2 if family == "vl" else 1
    counts = set(keys.per_pool("moe_num_experts", pools, 0))
    if len(counts) > 1:
        raise keys.error("moe_num_experts", "the same number for text and vision")
    num_experts = counts.pop()
    if num_experts == 0:
        if family == "vl":
            raise keys.error("moe_num_experts", "at least 1 in a vision-language model")
        return 0, (), ()
    widths = keys.per_pool("moe_intermediate_size", pools)
    if min(widths) < 1 or num_experts < 1:
        raise keys.error("moe_intermediate_size", "positive widths")
    if keys.positive("moe_k") > num_experts:
        raise keys.error("moe_k", f"at most moe_num_experts = {num_experts}")
    return num_experts, widths, _read_moe_layers(keys, pools, num_layers)


def _read_moe_layers(keys: Keys, pools: int, num_layers: int) -> tuple[int, ...]:
    if keys.has("mlp_layer_types"):
        return _layers_of_types(keys, num_layers)
    last, interval = num_layers - 1, keys.positive("moe_layer_interval", 1)
    starts = keys.per_pool("moe_layer_start_index", pools, 0)
    ends = [last if end < 0 else min(end, last) for end in keys.per_pool("moe_layer_end_index", pools, -1)]
    by_pool = [
        tuple(layer for layer in range(max(start, 0), end + 1) if (layer + 1) % interval == 0)
        for start, end in zip(starts, ends, strict=True)
    ]
    if len(set(by_pool)) > 1:
        raise ConfigError(
            f"moe_layer_start_index {starts} and moe_layer_end_index {tuple(ends)} give the text and vision "
            "experts different layers; Octet needs both in every layer that has experts"
        )
    return by_pool[0]


def _layers_of_types(keys: Keys, num_layers: int) -> tuple[int, ...]:
    """transformers lists one type per layer; num_hidden_layers may have been cut by an override."""
    types = keys.values["mlp_layer_types"]
    if not isinstance(types, list) or not set(types) <= {"dense", "sparse"} or len(types) < num_layers:
        raise keys.error("mlp_layer_types", f'a list of {num_layers} times "dense" or "sparse"')
    return tuple(layer for layer, kind in enumerate(types[:num_layers]) if kind == "sparse")


def _read_vision(keys: Keys) -> VisionConfig:
    vision = keys.section("vision_config")
    if not vision.values:
        raise ConfigError("vision_config is missing")
    if vision.has("hidden_act") and vision.values["hidden_act"] != "quick_gelu":
        raise vision.error("hidden_act", "'quick_gelu', the only activation Octet supports")
    hidden_size = vision.positive("embed_dim" if vision.has("embed_dim") else "hidden_size")
    config = VisionConfig(
        depth=vision.positive("depth"),
        hidden_size=hidden_size,
        num_heads=vision.positive("num_heads"),
        intermediate_size=_read_vision_width(vision, hidden_size),
        patch_size=vision.positive("patch_size", 14),
        in_channels=vision.positive("in_channels", vision.positive("in_chans", 3)),
        spatial_merge=vision.positive("spatial_merge_size", keys.positive("spatial_conv_size", 2)),
        temporal_merge=vision.positive("temporal_merge_size", keys.positive("temporal_conv_size", 2)),
        layer_norm_eps=vision.number("layer_norm_eps", vision.number("rms_norm_eps", 1e-6)),
        rope_theta=_read_rope_theta(vision, 10000.0),
    )
    for key, value in (
        ("pixel_hidden_size", config.hidden_size),
        ("spatial_conv_size", config.spatial_merge),
        ("temporal_conv_size", config.temporal_merge),
    ):
        if keys.positive(key, value) != value:
            raise keys.error(key, f"{value} as in vision_config")
    if config.hidden_size % config.num_heads or config.head_dim % 4:
        raise vision.error("num_heads", f"a divisor of {hidden_size} whose head width is a multiple of 4")
    return config


def _read_vision_width(vision: Keys, hidden_size: int) -> int:
    if vision.has("intermediate_size"):
        return vision.positive("intermediate_size")
    return round(vision.number("mlp_ratio", 4.0) * hidden_size)


def _read_dtype(keys: Keys) -> str:
    key = "dtype" if keys.has("dtype") else "torch_dtype"
    value = keys.values.get(key) or "bfloat16"
    if value not in ("bfloat16", "float32"):
        raise keys.error(key, "bfloat16 or float32")
    return str(value)


def _read_media_ids(keys: Keys, family: str, vocab_size: int) -> dict[str, int]:
    names = ("image_patch_id", "image_start_id", "image_end_id", "video_start_id", "video_end_id")
    if family == "text":  # no id reaches vocab_size, so no token is a vision token
        return dict(zip(names, (vocab_size, -1, -1, -1, -1), strict=True))
    ids = [keys.integer(key, default) for key, default in _MEDIA_IDS.items()]
    if not keys.has("im_patch_id"):
        ids[0] = keys.integer("image_token_id", ids[0])  # transformers' name of it
    for key, value in zip(_MEDIA_IDS, ids, strict=True):
        if value is None or not 0 <= value < vocab_size:
            raise ConfigError(f"{key} is {value}, expected an id below vocab_size = {vocab_size}")
    return dict(zip(names, ids, strict=True))  # type: ignore[arg-type]


def _check_consistent(config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"num_attention_heads is {config.num_heads}, expected a multiple of "
            f"num_key_value_heads = {config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise ConfigError(f"head_dim is {config.head_dim}, expected an even number")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""Configurations of the tiny checkpoints, as config.json in both published spellings.

`TinyModel` states each number once; `paddle_config` and `transformers_config` spell it. The tensors that
follow from it are in tiny_weights.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Layout = Literal["paddle", "pt"]


@dataclass(frozen=True)
class MediaIds:
    """Where the media markers lie; every id from `patch` on uses the vision experts."""

    patch: int
    image_start: int
    image_end: int
    video_start: int
    video_end: int


@dataclass(frozen=True)
class TinyModel:
    """A model of the true architecture; layer 0 is dense, the others have two pools of experts."""

    vocab_size: int
    media: MediaIds
    eos_token_ids: tuple[int, ...] = (2,)
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 8
    intermediate_size: int = 512
    num_experts: int = 8  # per pool
    expert_widths: tuple[int, int] = (64, 32)
    top_k: int = 2
    num_shared_experts: int = 0
    tied: bool = False
    time_frequencies: int = 4
    max_position_embeddings: int = 4096
    dtype: Literal["bfloat16", "float32"] = "float32"
    vision_depth: int = 2
    vision_hidden: int = 64
    vision_heads: int = 4
    weight_std: float = 0.08
    extra: dict[str, Any] = field(default_factory=dict)  # keys that only one reader of config.json needs

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def expert_layers(self) -> range:
        return range(1, self.num_layers)

    @property
    def shared_width(self) -> int:
        return self.num_shared_experts * self.expert_widths[0]

    @property
    def merged_size(self) -> int:
        """Width of a 2x2 window of vision features."""
        return 4 * self.vision_hidden


def golden_model() -> TinyModel:
    """What the goldens are made from; the vocabulary is shrunk, so the media ids move with it."""
    media = MediaIds(patch=448, image_start=449, image_end=450, video_start=451, video_end=452)
    # transformers tells videos from images by the placeholder; every other reader ignores this key.
    return TinyModel(vocab_size=512, media=media, num_layers=3, extra={"video_token_id": 453})


def golden_tied_model() -> TinyModel:
    """The golden model with what it lacks: a tied head, shared experts, fewer kv heads than query heads."""
    base = golden_model()
    return TinyModel(
        vocab_size=base.vocab_size,
        media=base.media,
        num_layers=base.num_layers,
        num_kv_heads=2,
        num_shared_experts=2,
        tied=True,
        extra=base.extra,
    )


def embedded_model(vocab_size: int, media: MediaIds, eos_token_ids: tuple[int, ...]) -> TinyModel:
    """The default model: eight ranks divide it, and their shares still fit groups of 64 and of 32.

    Eight ranks get 64 inputs of a text expert's second matrix and 32 of a vision expert's.
    """
    return TinyModel(
        vocab_size=vocab_size,
        media=media,
        eos_token_ids=eos_token_ids,
        intermediate_size=1024,
        expert_widths=(512, 256),
        num_shared_experts=1,
        max_position_embeddings=131072,
        dtype="bfloat16",
        weight_std=0.06,
    )


def config_json(model: TinyModel, layout: Layout) -> dict[str, Any]:
    return paddle_config(model) if layout == "paddle" else transformers_config(model)


def paddle_config(model: TinyModel) -> dict[str, Any]:
    """config.json as the -Paddle repositories write it: flat keys, [text, vision] lists."""
    last = model.num_layers - 1
    return {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": "ernie4_5_moe_vl",
        **_shared_keys(model),
        "head_dim": model.head_dim,
        "rope_theta": 500000.0,
        "rope_3d": True,
        "freq_allocation": model.time_frequencies,
        "moe_num_experts": [model.num_experts, model.num_experts],
        "moe_layer_start_index": [1, 1],
        "moe_layer_end_index": [last, last],
        "moe_layer_interval": 1,
        "moe_use_aux_free": True,
        "moe_use_hard_gate": True,
        "im_patch_id": model.media.patch,
        **_marker_keys(model),
        "pixel_hidden_size": model.vision_hidden,
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "use_temporal_conv": True,
        "torch_dtype": model.dtype,
        "vision_config": {
            "depth": model.vision_depth,
            "embed_dim": model.vision_hidden,
            "hidden_size": model.vision_hidden,
            "num_heads": model.vision_heads,
            "mlp_ratio": 4,
            "hidden_act": "quick_gelu",
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
        **model.extra,
    }


def transformers_config(model: TinyModel) -> dict[str, Any]:
    """config.json as transformers writes it: text_config and vision_config, one type per layer."""
    per_axis = (model.head_dim // 2 - model.time_frequencies) // 2
    return {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": "ernie4_5_vl_moe",
        "text_config": {
            "model_type": "ernie4_5_vl_moe_text",
            **_shared_keys(model),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500000.0,
                "mrope_section": [per_axis, per_axis, model.time_frequencies],
            },
            "mlp_layer_types": ["dense"] + ["sparse"] * len(model.expert_layers),
            "moe_num_experts": model.num_experts,
            "dtype": model.dtype,
        },
        "vision_config": {
            "model_type": "ernie4_5_vl_moe_vision",
            "depth": model.vision_depth,
            "hidden_size": model.vision_hidden,
            "num_heads": model.vision_heads,
            "intermediate_size": 4 * model.vision_hidden,
            "hidden_act": "quick_gelu",
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_merge_size": 2,
            "rms_norm_eps": 1e-6,
        },
        "image_token_id": model.media.patch,
        **_marker_keys(model),
        "tie_word_embeddings": model.tied,
        "dtype": model.dtype,
        **model.extra,
    }


def _shared_keys(model: TinyModel) -> dict[str, Any]:
    eos = model.eos_token_ids
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "intermediate_size": model.intermediate_size,
        "hidden_act": "silu",
        "use_bias": False,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": model.tied,
        "moe_intermediate_size": list(model.expert_widths),
        "moe_k": model.top_k,
        "moe_num_shared_experts": model.num_shared_experts,
        "moe_norm_min": 1e-12,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
    }


def _marker_keys(model: TinyModel) -> dict[str, int]:
    return {
        "image_start_token_id": model.media.image_start,
        "image_end_token_id": model.media.image_end,
        "video_start_token_id": model.media.video_start,
        "video_end_token_id": model.media.video_end,
    }

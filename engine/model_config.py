"""The model's own numbers, read from config.json into one frozen struct.

Accepts every spelling that published ERNIE-4.5 checkpoints use (Paddle keys, transformers' nested
`text_config`/`vision_config`, scalars or [text, vision] lists, nulls). Pure Python: the engine plans
memory with it, the api reads token ids from it, the workers build the model from it.
Facts and sources: model specification sections 1.1 to 1.6.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


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
    image_start_id: int
    image_end_id: int
    video_start_id: int
    video_end_id: int
    pad_token_id: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    vision: VisionConfig | None
    quantization_config: dict[str, Any] | None = None

    @property
    def num_pools(self) -> int:
        return len(self.moe_intermediate_sizes) if self.num_experts else 0

    def is_moe_layer(self, layer: int) -> bool:
        return layer in self.moe_layers

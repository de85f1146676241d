"""How many bytes one rank needs beside weights and KV cache: a step's buffers, the vision peak.

Upper bounds from shapes. The step's are the buffers of workers/model (workspace.py keeps each at its largest
size) and what the expert op sorts its rows into; the vision peak is the largest image or packed call through
encoder and resampler. Both are there at once when an image arrives in the middle of a full step.
"""

from __future__ import annotations

from typing import Any

from engine.model_config import ModelConfig, VisionConfig
from engine.plan_weights import DTYPE_BYTES, Dtype

_PATCHES_PER_CALL = 8192  # small images are packed into one encoder call up to this many
_ROWS_AT_ONCE = 4096  # of one feed-forward call of the encoder
_TOKEN_PIXELS = 28 * 28
_IMAGE_PIXELS = 16384 * _TOKEN_PIXELS  # what a request may ask for where the operator set no limit
_VIDEO_PIXELS = 1196 * _TOKEN_PIXELS  # of one frame


def step_bytes(model: ModelConfig, world: int, num_tokens: int, num_samples: int, dtype: Dtype) -> int:
    """Buffers of a step of `num_tokens` that samples `num_samples` rows."""
    hidden, size = model.hidden_size, DTYPE_BYTES[dtype]
    queries = model.num_heads // world * model.head_dim
    keys = max(model.num_kv_heads // world, 1) * model.head_dim
    widest = max(
        model.intermediate_size if len(model.moe_layers) < model.num_layers else 0,
        model.shared_intermediate_size,
    )
    row = 3 * hidden + (queries + 2 * keys) + 2 * queries + 3 * (widest // world)
    row += hidden if model.shared_intermediate_size else 0
    experts = max(model.moe_intermediate_sizes, default=0) // world
    # The expert op computes in fp32: its input; per chosen expert the inner row, the product, the routing.
    expert_row = 4 * hidden + model.moe_top_k * (4 * (hidden + experts) + 8) if experts else 0
    tables = 4 * model.head_dim  # fp32 cosines and sines
    rows = num_tokens * (row * size + expert_row + tables)
    return rows + num_samples * (3 * hidden * size + _logits_row(model, world))


def _logits_row(model: ModelConfig, world: int) -> int:
    """fp32 logits of one row: this rank's part, then all parts, then side by side."""
    vocabulary = 4 * (-(-model.vocab_size // world))
    return vocabulary if world == 1 else vocabulary * (1 + 2 * world)


def vision_bytes(model: ModelConfig, num_patches: int, dtype: Dtype) -> int:
    """Buffers of one encoder call over `num_patches`, and the features it leaves; 0 for text models."""
    vision, size = model.vision, DTYPE_BYTES[dtype]
    if vision is None:
        return 0
    width, chunk = vision.hidden_size, min(num_patches, _ROWS_AT_ONCE)
    # 6 rows of the width beside the pixels; 6.5 where two ranks share an item, fewer where more do
    encoder = num_patches * (vision.patch_features * (size + 1) + 13 * width * size // 2)
    encoder += chunk * ((vision.intermediate_size + width) * size + 8 * width)
    window = vision.merged_size * size
    windows = num_patches // vision.spatial_merge**2
    # spatial, inner, merged, temporal; an image is paired with itself, so its pairs are twice as many rows
    resampler = windows * (6 * window + 2 * model.hidden_size * size)
    return encoder + resampler


def largest_media_patches(vision: VisionConfig | None, processor_options: dict[str, Any]) -> int:
    """Patches of the largest encoder call: an image, a pair of frames, or small ones packed."""
    if vision is None:
        return 0
    image = processor_options.get("image_max_pixels", _IMAGE_PIXELS)
    frame = processor_options.get("video_max_pixels", _VIDEO_PIXELS)
    return max(image // vision.patch_size**2, 2 * frame // vision.patch_size**2, _PATCHES_PER_CALL)

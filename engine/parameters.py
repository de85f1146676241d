"""How many parameters a model has, by component, from its configuration alone.

The memory planner and the presets' test use it; no weight file is opened. The formulas are those of model
specification section 1.6, so the sums must give the published names (424B-A47B, 28B-A3B, ...).
"""

from __future__ import annotations

from engine.model_config import ModelConfig, VisionConfig


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters of each component; the values sum to the size of the whole model.

    lm_head is 0 when tied. Where the configuration leaves tying or shared experts to the tensors
    (None), an untied head and no shared experts are counted.
    """
    hidden, moe_layers = config.hidden_size, len(config.moe_layers)
    dense_layers = config.num_layers - moe_layers
    experts = [3 * hidden * width * config.num_experts for width in config.moe_intermediate_sizes]
    router = config.num_pools * config.num_experts * (hidden + 1)
    return {
        "embedding": config.vocab_size * hidden,
        "lm_head": 0 if config.tie_word_embeddings else config.vocab_size * hidden,
        "qkv": config.num_layers * hidden * config.qkv_size,
        "o_proj": config.num_layers * hidden * config.num_heads * config.head_dim,
        "dense_ffn": dense_layers * 3 * hidden * config.intermediate_size,
        "text_experts": moe_layers * experts[0] if experts else 0,
        "vision_experts": moe_layers * experts[1] if len(experts) > 1 else 0,
        "shared_experts": moe_layers * 3 * hidden * config.shared_intermediate_size,
        "routers": moe_layers * router,
        "norms": 2 * hidden * config.num_layers + hidden,
        "vision_tower": _vision_tower(config.vision) if config.vision else 0,
        "resampler": _resampler(config.vision, hidden) if config.vision else 0,
    }


def total_parameters(config: ModelConfig) -> int:
    return sum(parameter_counts(config).values())


def active_parameters(config: ModelConfig, pool: int = 0) -> int:
    """Parameters that one token reads in the decoder: 0 a text token, 1 a vision token.

    A text token counts one vocabulary matrix (the head); a vision token none, for nothing is sampled there.
    """
    counts = parameter_counts(config)
    active = sum(counts[name] for name in ("qkv", "o_proj", "dense_ffn", "shared_experts", "norms"))
    if config.num_pools:
        experts = counts["text_experts" if pool == 0 else "vision_experts"]
        active += experts // config.num_experts * config.moe_top_k + counts["routers"] // config.num_pools
    return active + (counts["embedding"] if pool == 0 else 0)


def _vision_tower(vision: VisionConfig) -> int:
    width, inner = vision.hidden_size, vision.intermediate_size
    attention = 4 * width**2 + 4 * width
    mlp = 2 * width * inner + inner + width
    norms = 4 * width
    return vision.patch_features * width + vision.depth * (attention + mlp + norms) + 2 * width


def _resampler(vision: VisionConfig, hidden: int) -> int:
    merged, paired = vision.merged_size, vision.merged_size * vision.temporal_merge
    square = merged**2 + merged
    spatial = 2 * square + 2 * merged
    temporal = paired * merged + merged + square + 2 * merged
    return spatial + temporal + merged * hidden + hidden + hidden

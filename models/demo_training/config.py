"""The demo model's numbers, and why: true architecture, at most 24 MB in bf16.

The spelling of config.json is shared with the tiny checkpoints (models/tiny_config.py). `python -m
models.demo_training.config` prints the parameter table.

what divides what   8 heads and 8 kv heads of 32: one per rank at TP 8. Expert width 256: 32 inputs of a down
                    matrix per rank, the smaller of wint4's two groups; hidden 256 gives four groups of
                    64 to gate and up. The dense width 1024 is int8 at wint4 and needs no group.
where capacity is   Reading glyphs of 14 pixels is the hardest skill, so two fifths of all parameters see: a
                    tower seven layers deep, 160 wide, whose four patches of a token make the resampler 640.
                    The decoder needs few layers for short answers; its vision experts, a fifth of the model,
                    read too. (But those of the last layer never matter, in any model of this family: nothing
                    reads the pictures' positions behind it.)
why not more        A fifth decoder layer costs 1.8 M parameters, as much as six tower layers. Narrower
                    experts would not divide at TP 8, fewer than four would leave top-2 little to choose.
                    Shared experts would cost 0.6 M; the 424B has none either.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from models.tiny_config import TinyModel
from models.tiny_tokenizer import added_tokens, end_token_ids, media_ids

MAX_EXPORT_BYTES = 24_000_000

# Bounds of the preprocessor. Larger pictures are shrunk to what training saw: 100 tokens, 36 per frame pair;
# smaller ones are enlarged, so that fewer letters share a token.
MIN_IMAGE_PIXELS = 168 * 168
MAX_IMAGE_PIXELS = 280 * 280
MIN_FRAME_PIXELS = 56 * 56
MAX_FRAME_PIXELS = 168 * 168


def demo_model() -> TinyModel:
    added = added_tokens(published_ids=False)
    return TinyModel(
        vocab_size=math.ceil((max(added.values()) + 1) / 64) * 64,
        media=media_ids(added),
        eos_token_ids=end_token_ids(),
        hidden_size=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=8,
        intermediate_size=1024,
        num_experts=4,
        expert_widths=(256, 256),
        top_k=2,
        num_shared_experts=0,
        tied=True,
        time_frequencies=4,
        max_position_embeddings=8192,
        dtype="bfloat16",
        vision_depth=7,
        vision_hidden=160,
        vision_heads=5,
    )


def mini_model() -> TinyModel:
    """The same architecture at a size whose training step takes milliseconds; for tests."""
    demo = demo_model()
    return TinyModel(
        vocab_size=demo.vocab_size,
        media=demo.media,
        eos_token_ids=demo.eos_token_ids,
        hidden_size=64,
        num_layers=2,
        num_heads=8,
        num_kv_heads=8,
        intermediate_size=64,
        num_experts=4,
        expert_widths=(64, 32),
        num_shared_experts=1,
        tied=True,
        time_frequencies=2,
        dtype="bfloat16",
        vision_depth=1,
        vision_hidden=32,
        vision_heads=2,
    )


def parameter_table(model: TinyModel) -> dict[str, int]:
    """Parameters by part (specification 1.6); routers and their bias are stored as fp32, all else as bf16."""
    hidden, head_width = model.hidden_size, model.head_dim
    layers, sparse = model.num_layers, len(model.expert_layers)
    s = model.merged_size
    vision, inner = model.vision_hidden, 4 * model.vision_hidden
    table = Counter(embedding=model.vocab_size * hidden * (1 if model.tied else 2))
    table["attention"] = layers * hidden * head_width * (2 * model.num_heads + 2 * model.num_kv_heads)
    table["dense"] = (layers - sparse) * 3 * hidden * model.intermediate_size
    table["text experts"] = sparse * model.num_experts * 3 * hidden * model.expert_widths[0]
    table["vision experts"] = sparse * model.num_experts * 3 * hidden * model.expert_widths[1]
    table["shared experts"] = sparse * 3 * hidden * model.shared_width
    table["routers (fp32)"] = sparse * 2 * model.num_experts * (hidden + 1)
    table["norms"] = (2 * layers + 1) * hidden
    block = 4 * vision * vision + 4 * vision + 2 * vision * inner + inner + vision + 4 * vision
    table["vision tower"] = 588 * vision + model.vision_depth * block + 2 * vision
    table["resampler"] = 2 * (s * s + s) + 2 * s + 3 * s * s + 2 * s + 2 * s + s * hidden + 2 * hidden
    return dict(table)


def stored_bytes(model: TinyModel) -> int:
    table = parameter_table(model)
    return 2 * sum(table.values()) + 2 * table["routers (fp32)"]


def preprocessor_config() -> dict[str, Any]:
    return {
        "patch_size": 14,
        "merge_size": 2,
        "temporal_conv_size": 2,
        "min_pixels": MIN_IMAGE_PIXELS,
        "max_pixels": MAX_IMAGE_PIXELS,
        "video_min_pixels": MIN_FRAME_PIXELS,
        "video_max_pixels": MAX_FRAME_PIXELS,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def main() -> None:
    model = demo_model()
    table = parameter_table(model)
    for part, count in table.items():
        print(f"{part:16s} {count:10,d}")
    print(f"{'total':16s} {sum(table.values()):10,d}   {stored_bytes(model) / 1e6:.2f} MB stored")


if __name__ == "__main__":
    main()

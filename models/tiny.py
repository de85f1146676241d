"""Writes a tiny checkpoint of the true architecture, the same bytes for the same seed.

    python -m models.tiny OUT [--layout paddle|pt|both] [--preset embedded|golden|golden-tied] [--seed N]
    python -m models.tiny OUT --tokenizer-only       a stand-in tokenizer with the published ids

With `--layout both`, OUT gets the folders paddle/ and pt/. Weights are random: the point is that every
tensor, name and file of a published repository is there. A program that needs one runs this module in a
process of its own; tests may call `write_tiny_checkpoint`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from models.tiny_config import (
    Layout,
    TinyModel,
    config_json,
    embedded_model,
    golden_model,
    golden_tied_model,
)
from models.tiny_tokenizer import added_tokens, end_token_ids, media_ids, write_json, write_tokenizer
from models.tiny_weights import write_weights

PRESETS = ("embedded", "golden", "golden-tied")
_TEMPLATE = Path(__file__).parents[1] / "api" / "templates" / "ernie_vl.jinja"


def write_tiny_checkpoint(
    folder: str | Path, layout: Layout = "paddle", seed: int = 0, preset: str = "embedded"
) -> Path:
    """Write config, weights and, for the embedded preset, the tokenizer's files; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(preset)
    write_json(folder / "config.json", config_json(model, layout))
    if preset == "embedded":
        write_companions(folder, published_ids=False)
    write_weights(folder / "model.safetensors", model, layout, seed)
    return folder


def tiny_model(preset: str) -> TinyModel:
    if preset == "golden":
        return golden_model()
    if preset == "golden-tied":
        return golden_tied_model()
    added = added_tokens(published_ids=False)
    rows = -(-(max(added.values()) + 1) // 64) * 64  # padded, as the published vocabulary is
    return embedded_model(rows, media_ids(added), end_token_ids())


def write_companions(folder: Path, *, published_ids: bool) -> None:
    """Everything beside config and weights: tokenizer, chat template, generation and media settings."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, published_ids=published_ids)
    shutil.copyfile(_TEMPLATE, folder / "chat_template.jinja")
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": list(end_token_ids()), "do_sample": True},
    )
    write_json(
        folder / "preprocessor_config.json",
        {
            "patch_size": 14,
            "merge_size": 2,
            "temporal_conv_size": 2,
            "min_pixels": 56 * 56,
            "max_pixels": 6177 * 28 * 28,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.tiny")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layout", choices=("paddle", "pt", "both"), default="paddle")
    parser.add_argument("--preset", choices=PRESETS, default="embedded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer-only", action="store_true")
    options = parser.parse_args()
    if options.tokenizer_only:
        write_companions(options.out, published_ids=True)
    elif options.layout == "both":
        for layout in ("paddle", "pt"):
            write_tiny_checkpoint(options.out / layout, layout, options.seed, options.preset)
    else:
        write_tiny_checkpoint(options.out, options.layout, options.seed, options.preset)


if __name__ == "__main__":
    main()

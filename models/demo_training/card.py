"""The model card that is exported with the weights: what it is, how it was made, how well it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.demo_training.config import parameter_table
from models.demo_training.scores import EVALUATION_FILE
from models.tiny_config import TinyModel

_TEXT = """# Octet demo model

A small ERNIE-4.5-VL of the true architecture (3-D rope, two expert pools with correction bias, vision tower,
resampler with temporal merge), {millions:.1f} M parameters in bf16, in the -Paddle layout. It sees a small
drawn world: shapes, colours, counts to nine, numbers and short words, up to four pictures, simple clips. It
calculates, repeats, calls tools, writes JSON and can think first, in English and Chinese. Everything else it
declines, or gets wrong: it is a test and a demonstration, not an assistant.

Made by `models/demo_training` from generated samples only, in the stages that its README lists; the last one
took {samples:,}, most with several questions, in {steps:,} steps and {minutes:.0f} minutes by the clock. No
published weights and no collected data were used.

## Parameters

| part | parameters |
|---|---|
{parts}

## Evaluation

Share of right answers on fresh samples that training never drew, greedy.
{scores}
Over the API, in every way of serving (`./run.sh eval --save` fills the table in):

<!-- figures: eval -->
<!-- end of figures -->
"""


def model_card(run: Path, sizes: TinyModel, progress: dict[str, Any]) -> str:
    parts, scores = parameter_table(sizes), score_table(run / EVALUATION_FILE)
    return _TEXT.format(
        millions=sum(parts.values()) / 1e6,
        samples=progress["samples"],
        steps=progress["step"],
        minutes=progress["seconds"] / 60,
        parts="\n".join(f"| {part} | {count:,} |" for part, count in parts.items() if count),
        scores=f"\n{scores}\n" if scores else "",
    )


def score_table(file: Path) -> str:
    """One row per skill, one column per way of answering; empty where `evaluate` has kept none."""
    if not file.is_file():
        return ""
    columns: dict[str, dict[str, float]] = json.loads(file.read_text())
    skills = list(dict.fromkeys(skill for scores in columns.values() for skill in scores))
    head = f"| skill | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"
    rows = [
        f"| {skill} | " + " | ".join(_percent(scores.get(skill)) for scores in columns.values()) + " |"
        for skill in skills
    ]
    return "\n".join([head, *rows])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"

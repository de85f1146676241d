"""Right answers counted by skill; free of any framework, so that a served model can be judged without one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from models.demo_training.sample import Sample

EVALUATION_FILE = "evaluation.json"  # {"bfloat16 TP 1": {"shapes": 0.99, ...}, ...}, in the run's folder


@dataclass
class Score:
    right: int = 0
    total: int = 0

    @property
    def share(self) -> float:
        return self.right / max(1, self.total)


def is_right(sample: Sample, written: str) -> bool:
    """Judges what the model wrote behind the generation prompt, reasoning included.

    A thinking sample must close its reasoning, what stands behind is the answer; others must not reason.
    """
    reasoning, tag, answer = written.partition("</think>")
    if not sample.thinks:
        return not tag and sample.checker(written)
    return bool(tag and reasoning.strip()) and sample.checker(answer.strip("\n"))


def table(scores: dict[str, Score]) -> str:
    lines = [f"{skill:14s} {100 * s.share:6.1f} %  {s.right}/{s.total}" for skill, s in scores.items()]
    mean = sum(s.share for s in scores.values()) / max(1, len(scores))
    return "\n".join([*lines, f"{'mean':14s} {100 * mean:6.1f} %"])


def save(folder: Path, name: str, scores: dict[str, Score]) -> None:
    """Add or replace one column."""
    file = folder / EVALUATION_FILE
    columns = json.loads(file.read_text()) if file.is_file() else {}
    columns[name] = {skill: score.share for skill, score in scores.items()}
    file.write_text(json.dumps(columns, indent=2) + "\n")

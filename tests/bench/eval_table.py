"""The table of an evaluation: skills by ways of serving, with what each should reach.

Used by bench_eval.py on the terminal and by tables.py in the READMEs, where each column comes from the latest
kept run that has it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.result_files import Result

# Shares of right answers that the model is meant to reach in bfloat16; other skills have no aim of their own.
AIMS = {
    "shapes": 0.97,
    "counts": 0.95,
    "digits": 0.95,
    "words": 0.90,
    "pictures": 0.95,
    "motion": 0.95,
    "flashes": 0.90,
    "tools": 0.95,
}
# How far the mean may lie below that of bfloat16 with as many ranks.
MOST_LOST = {"wint8": 0.005, "wint4": 0.02}
_NO_SKILLS = ("samples", "seconds")

Columns = Mapping[str, Mapping[str, Any]]  # way -> skill -> share


def console_table(columns: Columns) -> str:
    lines = [f"{'skill':14s}" + "".join(f"{way:>16s}" for way in columns) + "   aim"]
    for skill in _skills(columns):
        cells = "".join(f"{_percent(figures.get(skill)):>16s}" for figures in columns.values())
        lines.append(f"{skill:14s}{cells}   {_aim(skill)}")
    means = "".join(f"{_percent(mean_of(figures)):>16s}" for figures in columns.values())
    return "\n".join([*lines, f"{'mean':14s}{means}", *_misses(columns)])


def markdown_table(results: Sequence[Result], page: Path) -> str:
    """The latest kept column of every way; `results` are oldest first."""
    latest = {way: result for result in results if result.bench == "eval" for way in result.figures}
    if not latest:
        return "Not evaluated yet: `./run.sh eval --save`."
    columns = {way: latest[way].figures[way] for way in sorted(latest, key=_order)}
    links = [f"[{way}]({os.path.relpath(latest[way].path, page.parent)})" for way in columns]
    lines = [f"| skill | {' | '.join(links)} | aim |", f"|---|{'---|' * len(columns)}---|"]
    for skill in _skills(columns):
        shares = (figures.get(skill) for figures in columns.values())
        missed = ", missed" if any(_is_missed(way, skill, columns[way]) for way in columns) else ""
        lines.append(f"| {skill} | {' | '.join(map(_percent, shares))} | {_aim(skill)}{missed} |")
    means = " | ".join(_percent(mean_of(figures)) for figures in columns.values())
    counts = " | ".join(str(figures["samples"]) for figures in columns.values())
    return "\n".join([*lines, f"| **mean** | {means} | |", f"| samples per skill | {counts} | |"])


def mean_of(figures: Mapping[str, Any]) -> float:
    shares = [share for skill, share in figures.items() if skill not in _NO_SKILLS]
    return sum(shares) / len(shares)


def _misses(columns: Columns) -> list[str]:
    """Sentences about what an aim misses."""
    missed = [
        f"{way}: {skill} {_percent(figures[skill])}, aim {_aim(skill)}"
        for way, figures in columns.items()
        for skill in AIMS
        if _is_missed(way, skill, figures)
    ]
    for way, figures in columns.items():
        kind, _, ranks = way.partition(" ")
        reference = columns.get(f"bfloat16 {ranks}")
        if reference is not None and kind in MOST_LOST:
            lost = mean_of(reference) - mean_of(figures)
            if lost > MOST_LOST[kind]:
                missed.append(
                    f"{way}: {100 * lost:.1f} points below bfloat16, at most {100 * MOST_LOST[kind]:g}"
                )
    return ["missed:", *(f"  {line}" for line in missed)] if missed else ["every aim is reached"]


def _is_missed(way: str, skill: str, figures: Mapping[str, Any]) -> bool:
    return way.startswith("bfloat16") and skill in figures and figures[skill] < AIMS.get(skill, 0.0)


def _skills(columns: Columns) -> list[str]:
    names = dict.fromkeys(skill for figures in columns.values() for skill in figures)
    return [name for name in names if name not in _NO_SKILLS]


def _order(way: str) -> tuple[int, int]:
    kind, _, ranks = way.partition(" TP ")
    kinds = ("bfloat16", "wint8", "wint4")
    return int(ranks), kinds.index(kind) if kind in kinds else len(kinds)


def _aim(skill: str) -> str:
    return f"{100 * AIMS[skill]:.0f} %" if skill in AIMS else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"

"""What the measuring programs of this folder share: their figures, and how these are shown and handed on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Figures = dict[
    str, dict[str, Any]
]  # {what: {measure: number, or words}}; null where it could not be measured


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--emulated", action="store_true", help="without a GPU; times mean nothing")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")


def show(figures: Figures, path: Path | None) -> None:
    print(table(figures), flush=True)
    if path is not None:
        path.write_text(json.dumps(figures))


def table(figures: Figures) -> str:
    """A line per entry."""
    lines = []
    for name, found in figures.items():
        numbers = "  ".join(
            f"{measure} {value:.4g}" if isinstance(value, float) else f"{measure}: {value}"
            for measure, value in found.items()
        )
        lines.append(f"{name:<60} {numbers}")
    return "\n".join(lines)

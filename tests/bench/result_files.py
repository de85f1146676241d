"""Results of benchmarks as files: one JSON per kept run, `results/<bench>-<UTC date>-<time>.json`.

    bench      "cpu", "ops", ...: the name behind ./run.sh bench
    date       UTC, ISO 8601
    commit     short hash; is_changed: the tree's sources differed from it
    command    what was typed
    machine    processor, threads that may be used, memory_gib, load_average at the end; gpu if one was used
    settings   what tells this run from others of the same bench: layers, format, ranks ...
    figures    {name: {measure: number}}, the unit in the measure's name: "tokens_per_second", "gb_per_second"

Every benchmark takes --save (save_option) and calls `save`. The tables of the READMEs are made from the
latest of these files by tables.py. Numbers that could not be measured are null.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
FIELDS = ("bench", "date", "commit", "is_changed", "command", "machine", "settings", "figures")

_SOURCES = ("api", "cuda_ops", "engine", "models", "workers", "run.sh")
_DIGITS = 5  # significant ones that are kept

Figures = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Result:
    """One file, read back."""

    path: Path
    bench: str
    date: str
    commit: str
    command: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    figures: dict[str, dict[str, Any]]


def save_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--save",
        action="store_true",
        help="keep the figures in tests/bench/results and in the READMEs' tables",
    )


def save(
    bench: str,
    figures: Figures,
    settings: Mapping[str, Any] | None = None,
    *,
    gpu: str = "",
    folder: Path = RESULTS,
) -> Path:
    """Write the file, bring the tables up to date, and say where it is. Returns its path."""
    now = datetime.now(timezone.utc)
    content = {
        "bench": bench,
        "date": now.isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "is_changed": bool(_git("status", "--porcelain", "--untracked-files=no", "--", *_SOURCES)),
        "command": _command(bench),
        "machine": machine() | ({"gpu": gpu} if gpu else {}),
        "settings": dict(settings or {}),
        "figures": {name: dict(measures) for name, measures in figures.items()},
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{bench}-{now:%Y-%m-%d-%H%M%S}.json"
    path.write_text(json.dumps(_tidy(content), indent=1) + "\n")
    print(f"kept in {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    if folder == RESULTS:
        from tests.bench.tables import update  # it reads what was just written

        update()
    return path


def read_results(folder: Path = RESULTS) -> list[Result]:
    """All of them, oldest first. Raises ValueError for a file that is not in this format."""
    found = []
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or tuple(content) != FIELDS:
            raise ValueError(f"{path} is not a result: it needs exactly the fields {', '.join(FIELDS)}")
        content.pop("is_changed")
        found.append(Result(path, **content))
    return sorted(found, key=lambda result: result.date)


def machine() -> dict[str, Any]:
    """Processor, threads, memory, and how busy it is."""
    return {
        "processor": processor(),
        "threads": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(value, 1) for value in os.getloadavg()],
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def heading() -> str:
    """'AMD EPYC, 2 threads, commit 0123abc': the first line that a benchmark prints."""
    about = machine()
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    return f"{about['processor']}, {about['threads']} threads, {datetime.now().date()}, commit {commit}"


def _command(bench: str) -> str:
    return shlex.join(["./run.sh", "bench", bench, *sys.argv[1:]])


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _tidy(value: Any) -> Any:
    """Few digits; NaN, which JSON has not, as null."""
    if isinstance(value, dict):
        return {key: _tidy(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_tidy(inner) for inner in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return float(f"{value:.{_DIGITS}g}")

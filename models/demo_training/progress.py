"""What a run tells while it trains: a line with rate, time left and every skill's loss, and a JSON log."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from models.demo_training.collate import SKILL_NAMES


class Reporter:
    """Collects per-skill losses between lines."""

    def __init__(self, log: Path, every_seconds: float) -> None:
        self._log = log
        self._every = every_seconds
        self._reset()

    def add(self, skills: list[int], losses: list[float], exact: list[bool]) -> None:
        """One micro-batch: mean token loss of each sample, and whether every token was the likeliest one."""
        for skill, loss, is_exact in zip(skills, losses, exact, strict=True):
            self._losses[SKILL_NAMES[skill]].append(loss)
            self._exact[SKILL_NAMES[skill]].append(is_exact)

    def add_seeing(self, loss: torch.Tensor) -> None:
        """The tower's own loss of a micro-batch."""
        self._seeing.append(float(loss.detach()))

    @property
    def is_due(self) -> bool:
        return self.has_news and time.monotonic() - self._since >= self._every

    @property
    def has_news(self) -> bool:
        return bool(self._losses or self._seeing)

    def line(
        self, step: int, samples: int, done: float, seconds: float, rate: float, extra: dict[str, Any]
    ) -> None:
        """Print and log. done: finished share; seconds: training time so far; rate: of learning."""
        count = sum(map(len, self._losses.values()))
        per_second = count / max(1e-9, time.monotonic() - self._since)
        losses = {skill: sum(v) / len(v) for skill, v in sorted(self._losses.items())}
        exact = {skill: sum(v) / len(v) for skill, v in sorted(self._exact.items())}
        seeing = sum(self._seeing) / max(1, len(self._seeing))
        left = seconds * (1 - done) / done if done > 0 else 0.0
        mean = sum(sum(v) for v in self._losses.values()) / max(1, count)
        print(
            f"step {step}  {samples} samples  {100 * done:.1f} %  {per_second:.1f}/s  left {_clock(left)}  "
            f"lr {rate:.1e}  loss {mean:.3f}  patches {seeing:.3f}  "
            + " ".join(f"{skill} {loss:.2f}/{100 * exact[skill]:.0f}%" for skill, loss in losses.items())
            + "".join(f"\n    {what}: {100 * share:.1f} %" for what, share in extra.get("seen", {}).items()),
            flush=True,
        )
        entry = {"step": step, "samples": samples, "done": done, "seconds": seconds, "rate": per_second}
        self.log({**entry, "loss": losses, "seeing": seeing, "exact": exact, **extra})
        self._reset()

    def log(self, entry: dict[str, Any]) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _reset(self) -> None:
        self._losses: dict[str, list[float]] = defaultdict(list)
        self._exact: dict[str, list[bool]] = defaultdict(list)
        self._seeing: list[float] = []
        self._since = time.monotonic()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"

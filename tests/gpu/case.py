"""One op at one shape: how it is run, what it must answer, what it must move, and what else can do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tests.gpu.machine import Work

BF16_STEP = 2.0**-8  # relative rounding of one bf16 result


@dataclass(frozen=True)
class Answer:
    """What an op wrote, and the same in float64."""

    name: str
    actual: torch.Tensor
    expected: torch.Tensor
    tolerance: float = 2 * BF16_STEP  # of the largest expected value

    def complaint(self) -> str | None:
        """None if it is right; else the worst place and both values."""
        actual, expected = self.actual.double().reshape(-1), self.expected.double().reshape(-1)
        if expected.numel() == 0:
            return None
        error = (actual - expected).abs()
        error[actual == expected] = 0  # infinities of one sign
        error[error.isnan()] = torch.inf
        finite = expected[expected.isfinite()]
        allowed = self.tolerance * float(finite.abs().max()) if finite.numel() else 0.0
        worst = int(error.argmax())
        if float(error[worst]) <= allowed:
            return None
        return (
            f"{self.name}[{worst}] is {float(actual[worst]):.6g}, not {float(expected[worst]):.6g} "
            f"(allowed: {allowed:.2g})"
        )


@dataclass(frozen=True)
class Case:
    """`run` queues the op; `answers` are read after it."""

    op: str
    shape: str
    run: Work
    answers: Callable[[], list[Answer]]
    num_bytes: float  # that must be read or written once
    flops: float = 0.0  # on tensor cores
    peers: dict[str, Work] = field(default_factory=dict)  # the same by PyTorch or Triton
    anchor: str = ""  # somebody's figure for this shape
    is_warm: bool = False  # its data may be in the cache, as in a step

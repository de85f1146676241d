"""Comparisons that say where two arrays differ most, and a count of work that needs no clock."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str = "array") -> None:
    """Fail with the worst index and both values when |actual - expected| exceeds `tolerance`."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    if actual.size == 0:
        return
    error = np.where(np.isfinite(actual) | (actual == expected), np.abs(actual - expected), np.inf)
    error = np.where(actual == expected, 0.0, error)
    worst = np.unravel_index(np.argmax(error), error.shape)
    assert error[worst] <= tolerance, (
        f"{what}: worst at {tuple(int(i) for i in worst)}: {actual[worst]!r}, expected {expected[worst]!r}, "
        f"off by {error[worst]:.3g}, allowed {tolerance:.3g}"
    )


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, what: str = "array") -> None:
    """Fail with the first differing index; NaNs must match too."""
    actual, expected = np.ascontiguousarray(actual), np.ascontiguousarray(expected)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, (
        f"{what}: {actual.dtype}{actual.shape}, expected {expected.dtype}{expected.shape}"
    )
    differs = actual.view(np.uint8).reshape(-1) != expected.view(np.uint8).reshape(-1)
    if differs.any():
        flat = int(np.argmax(differs)) // actual.itemsize
        where = tuple(int(i) for i in np.unravel_index(flat, actual.shape))
        raise AssertionError(
            f"{what}: bits differ first at {where}: {actual[where]!r}, not {expected[where]!r}"
        )


def python_lines(call: Callable[[], object]) -> int:
    """How many lines of Python a call runs, callees included: work that grows shows without a clock."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    gc.disable()  # what the collector ends has lines of its own
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        gc.enable()
    return count

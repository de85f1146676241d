"""Small worlds for the CUDA bodies: bf16 as raw bits, and the launchers through the emulator."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

FLOAT32, BFLOAT16 = 0, 1  # octet::DType
NAN_BF16 = np.uint16(0x7FFF)

# In an AddressSanitizer build the emulator sees no single access (cuda_ops/emulator.py).
NEEDS_HOOKS = pytest.mark.skipif(
    os.environ.get("OCTET_EMULATOR_SANITIZE") == "address",
    reason="AddressSanitizer is in the place of the hooks",
)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bits in uint16, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), NAN_BF16, rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """fp32 values that bf16 holds exactly."""
    return from_bf16(to_bf16(values))


def encode(values: np.ndarray, dtype: int) -> np.ndarray:
    return to_bf16(values) if dtype == BFLOAT16 else np.ascontiguousarray(values, np.float32)


def decode(array: np.ndarray) -> np.ndarray:
    return from_bf16(array) if array.dtype == np.uint16 else array


def empty(shape: tuple[int, ...], dtype: int) -> np.ndarray:
    """An output full of NaN, so that what a kernel forgets to write shows."""
    return np.full(shape, NAN_BF16) if dtype == BFLOAT16 else np.full(shape, np.nan, np.float32)


def tolerance(dtype: int, expected: np.ndarray) -> float:
    """Rounding of the output type at the largest value, with room for the order of fp32 sums."""
    largest = float(np.abs(expected).max(initial=1.0))
    return largest * (2**-8 if dtype == BFLOAT16 else 2e-6)


@contextmanager
def reported(text: str) -> Iterator[None]:
    """The block must end in an EmulatorError that holds `text`."""
    from cuda_ops.emulator import EmulatorError

    with pytest.raises(EmulatorError) as caught:
        yield
    assert text in str(caught.value), str(caught.value)

"""bf16 on the host: NumPy has no such type, so it travels as uint16 raw bits."""

from __future__ import annotations

import numpy as np


def bits_from_float32(values: np.ndarray) -> np.ndarray:
    """fp32 -> uint16 bits of the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def float32_from_bits(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bf16 -> fp32, exact."""
    return (np.ascontiguousarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)

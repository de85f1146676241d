"""Tensors for op tests: fp32 ones are NumPy arrays, bf16 ones are Paddle tensors.

Outputs start as NaN, so an element that an op forgets to write shows.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # paddle warns about its own surroundings at import
    import paddle

import cuda_ops

DTYPES = ("float32", "bfloat16")
WEIGHT_KINDS = ("float32", "bfloat16", "int8", "int4")


def rounded(values: np.ndarray) -> np.ndarray:
    """fp32 values with the precision of bf16: to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).reshape(np.shape(values))


def bf16(values: np.ndarray) -> Any:
    high_halves = (rounded(values).view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
    return paddle.to_tensor(high_halves).view("bfloat16").reshape(list(np.shape(values)))


def tensor(values: np.ndarray, dtype: str) -> Any:
    """A fresh tensor of `dtype` with these values."""
    return bf16(values) if dtype == "bfloat16" else np.array(values, np.float32)


def values_of(values: np.ndarray, dtype: str) -> np.ndarray:
    """What a tensor of `dtype` made of these values holds, as fp32."""
    return rounded(values) if dtype == "bfloat16" else np.asarray(values, np.float32)


def unwritten(shape: tuple[int, ...], dtype: str) -> Any:
    return tensor(np.full(shape, np.nan, np.float32), dtype)


def read(result: Any) -> np.ndarray:
    """A tensor's values as fp32."""
    if isinstance(result, np.ndarray):
        return result
    return result.astype("float32").numpy()


def make_weight(
    rand: Any, kind: str, out_features: int, in_features: int, group: int = 16, stack: tuple[int, ...] = ()
) -> tuple[cuda_ops.Weight, np.ndarray]:
    """A random weight of this kind, and the fp32 matrix it stands for."""
    shape = (*stack, out_features, in_features)
    if kind in DTYPES:
        values = values_of(rand.normal(*shape), kind)
        return cuda_ops.Weight(kind, tensor(values, kind)), values
    if kind == "int8":
        q = rand.numpy.integers(-127, 128, shape).astype(np.int8)
        scales = rounded(rand.numpy.uniform(0.005, 0.02, shape[:-1]))
        return cuda_ops.Weight("int8", q, bf16(scales)), q * scales[..., None]
    q = rand.numpy.integers(-8, 8, shape).astype(np.int8)
    scales = rounded(rand.numpy.uniform(0.05, 0.2, (*shape[:-1], in_features // group)))
    data = ((q[..., 0::2] & 15) | (q[..., 1::2] & 15) << 4).astype(np.uint8)
    return cuda_ops.Weight("int4", data, bf16(scales), group), q * np.repeat(scales, group, axis=-1)


def allowed(dtype: str, expected: np.ndarray, num_terms: int = 1) -> float:
    """Absolute error that rounding explains in sums of `num_terms` products as large as the result."""
    size = float(np.abs(expected).max()) if expected.size else 1.0
    return size * (2.0**-8 if dtype == "bfloat16" else 2.0**-20 * max(1.0, num_terms**0.5))

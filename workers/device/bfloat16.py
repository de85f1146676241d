"""Arrays on the host as devices take them. NumPy has no bf16, so it travels as uint16 raw bits."""

from __future__ import annotations

import numpy as np

from workers.device.base import DtypeName

HOST_TYPES: dict[DtypeName, type] = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "int8": np.int8,
    "uint8": np.uint8,
    "int32": np.int32,
    "int64": np.int64,
}


def host_array(array: np.ndarray, dtype: DtypeName | None) -> np.ndarray:
    """The contiguous array whose bits a tensor of `dtype` gets (None: of the array's own type).

    fp32 becomes bf16 where that is asked for; nothing else is converted, but refused with a TypeError.
    """
    if dtype == "bfloat16" and array.dtype == np.float32:
        return bits_from_float32(array)
    is_wrong = array.dtype == np.uint16 if dtype is None else array.dtype != HOST_TYPES[dtype]
    if is_wrong:
        raise TypeError(f"cannot upload {array.dtype} as {dtype}: convert it first")
    return np.ascontiguousarray(array)


def bits_from_float32(values: np.ndarray) -> np.ndarray:
    """fp32 -> uint16 bits of the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def float32_from_bits(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bf16 -> fp32, exact."""
    return (np.ascontiguousarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)

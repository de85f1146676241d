"""The structures that launchers take by reference, as ctypes; fields as in csrc/gpu and csrc/include."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from cuda_ops.emulator import emulator

from .builders import encode, from_bf16, rounded, to_bf16

KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}  # octet::WeightKind
PIECES = {"float32": 8, "bfloat16": 4, "int8": 2, "int4": 1}  # of 512 bytes per tile


class WeightView(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("group", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("is_packed", ctypes.c_bool),
    ]


class PackedWeight(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int),
        ("group", ctypes.c_int32),
        ("is_gated", ctypes.c_bool),
        ("tiles", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("out_features", ctypes.c_int32),
        ("in_features", ctypes.c_int32),
    ]


class PackedExperts(ctypes.Structure):
    _fields_ = [("up_gate", PackedWeight), ("down", PackedWeight)]


@dataclass
class Weight:
    """A stack of matrices: what they are worth in fp32, and packed for the kernels."""

    values: np.ndarray  # [count, N, K] fp32, after quantisation
    packed: PackedWeight
    arrays: list[np.ndarray]  # what `packed` points to

    @property
    def argument(self) -> tuple[PackedWeight, list[np.ndarray]]:
        return self.packed, self.arrays


def aligned(size: int, dtype: type) -> np.ndarray:
    """Uninitialised (0xA5) bytes at a multiple of 256, as a device allocator gives them."""
    raw = np.full(size * np.dtype(dtype).itemsize + 256, 0xA5, np.uint8)
    begin = -raw.ctypes.data % 256
    return raw[begin : begin + size * np.dtype(dtype).itemsize].view(dtype)


def quantized(weight: np.ndarray, kind: str, group: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """(data, scales, values) of a [count, N, K] stack, by the rule of the quantise ops."""
    if kind == "float32":
        return weight.astype(np.float32), None, weight.astype(np.float32)
    if kind == "bfloat16":
        return to_bf16(weight), None, rounded(weight)
    limit, size = (127, weight.shape[-1]) if kind == "int8" else (7, group)
    grouped = weight.reshape(*weight.shape[:-1], weight.shape[-1] // size, size)
    scales = rounded(np.abs(grouped).max(axis=-1, keepdims=True) / np.float32(limit))
    scales[scales == 0] = 1
    q = np.clip(np.trunc(grouped / scales + np.copysign(0.5, grouped)), -limit, limit).astype(np.int8)
    values = (q * scales).astype(np.float32).reshape(weight.shape)
    q = q.reshape(weight.shape)
    data = q if kind == "int8" else ((q[..., 0::2] & 15) | (q[..., 1::2] << 4)).astype(np.int8).view(np.uint8)
    return data, to_bf16(scales[..., 0]), values


def pack(weight: np.ndarray, kind: str, group: int = 64, is_gated: bool = False) -> Weight:
    """Quantise a [count, N, K] stack and pack it with the CUDA body of pack_weight."""
    count, n, k = weight.shape
    data, scales, values = quantized(weight, kind, group)
    view = WeightView(
        KINDS[kind], data.ctypes.data, None if scales is None else scales.ctypes.data, group, n, k
    )
    row_tiles, column_tiles = -(-n // 16), -(-k // 64)
    tiles = aligned(count * row_tiles * column_tiles * PIECES[kind] * 512, np.uint8)
    groups = {"int4": column_tiles * 64 // (group or 64), "int8": 1}.get(kind, 0)
    num_scales = groups * row_tiles * 16 * count
    packed_scales = aligned(num_scales, np.uint16)
    packed = PackedWeight(
        KINDS[kind],
        group,
        is_gated,
        tiles.ctypes.data,
        packed_scales.ctypes.data if num_scales else None,
        n,
        k,
    )
    arrays = [tiles, packed_scales]
    sources = [data] if scales is None else [data, scales]
    emulator().call("pack_weight", None, (view, sources), count, (packed, arrays))
    return Weight(values, packed, arrays)


__all__ = ["PackedExperts", "PackedWeight", "Weight", "WeightView", "aligned", "encode", "from_bf16", "pack"]

"""The device seam on PaddlePaddle. This file and its siblings are the only ones that import a framework.

The CPU implementation, `PaddleCpu`; memory comes from Paddle, arithmetic from cuda_ops. Importing this module
imports Paddle (seconds), so workers/device/__init__.py does it only when a device is opened.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from workers.device.base import Activation, DtypeName, Group, Tensor
from workers.device.bfloat16 import bits_from_float32, float32_from_bits


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Let imports inside find no `module`, unless it is loaded already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


# Paddle imports tvm_ffi, which would import PyTorch where that is installed: seconds and memory for nothing.
with _hidden("torch"), warnings.catch_warnings():
    # Paddle looks for a compiler cache that it would use to build C++ extensions; Octet builds none with it.
    warnings.filterwarnings("ignore", message="No ccache found", category=UserWarning)
    import paddle

if TYPE_CHECKING:
    from cuda_ops import Weight

_NAMES: dict[object, DtypeName] = {
    paddle.float32: "float32",
    paddle.bfloat16: "bfloat16",
    paddle.int8: "int8",
    paddle.uint8: "uint8",
    paddle.int32: "int32",
    paddle.int64: "int64",
}
_BITS: dict[DtypeName, type] = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "int8": np.int8,
    "uint8": np.uint8,
    "int32": np.int32,
    "int64": np.int64,
}
_ADD_ROWS = 4096  # rows of one bf16 addition, to bound its fp32 copies


class PaddleCpu:
    """One rank on the host's memory and cores. Implements workers.device.base.Device."""

    def __init__(self, rank: int = 0, world: int = 1, group: Group | None = None) -> None:
        """`group` joins the ranks; it may be None only when `world` is 1."""
        if group is None and world > 1:
            raise ValueError(f"{world} ranks need a group to meet in")
        self.name = "cpu"
        self.rank = rank
        self.world = world
        self.slowest_flops = 5e9
        self._group = group
        paddle.device.set_device("cpu")

    # memory and copies --------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: DtypeName) -> Tensor:
        return paddle.empty(list(shape), dtype=dtype)

    def zeros(self, shape: Sequence[int], dtype: DtypeName) -> Tensor:
        return paddle.zeros(list(shape), dtype=dtype)

    def upload(self, array: np.ndarray, dtype: DtypeName | None = None) -> Tensor:
        return paddle.to_tensor(_host_bits(array, dtype))

    def write(self, tensor: Tensor, array: np.ndarray) -> None:
        if list(array.shape) != list(tensor.shape) or not tensor.is_contiguous():
            raise ValueError(f"cannot write {array.shape} into a tensor of shape {list(tensor.shape)}")
        bits = _host_bits(array, _NAMES[tensor.dtype])
        ctypes.memmove(tensor.data_ptr(), bits.ctypes.data, bits.nbytes)

    def download(self, tensor: Tensor) -> np.ndarray:
        array = tensor.numpy()
        return float32_from_bits(array) if tensor.dtype == paddle.bfloat16 else array

    def host_bits(self, tensor: Tensor) -> np.ndarray:
        dtype = np.dtype(_BITS[_NAMES[tensor.dtype]])
        if 0 in tensor.shape:
            return np.empty(tuple(tensor.shape), dtype)
        if not tensor.is_contiguous():
            raise ValueError(f"cannot look at a tensor of shape {list(tensor.shape)} that is not contiguous")
        memory = (ctypes.c_char * (prod(tensor.shape) * dtype.itemsize)).from_address(tensor.data_ptr())
        return np.frombuffer(memory, dtype).reshape(tuple(tensor.shape))

    def adopt(self, array: np.ndarray, dtype: DtypeName) -> Tensor:
        if array.dtype != _BITS[dtype]:
            raise TypeError(f"cannot take {array.dtype} for {dtype}")
        if dtype != "bfloat16":
            return paddle.from_dlpack(array)
        return paddle.from_dlpack(array.view(np.int16)).view("bfloat16")  # NumPy has no bf16 to hand over

    def view(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        if 0 in tensor.shape:  # Paddle cannot view what has no elements
            return paddle.empty(list(shape), dtype=tensor.dtype)
        return tensor.view(list(shape))

    def free_memory(self) -> int:
        return min(_meminfo("MemAvailable"), _cgroup_limit())

    def total_memory(self) -> int:
        return min(_meminfo("MemTotal"), _cgroup_limit())

    # arithmetic ---------------------------------------------------------------------------------------

    def linear(
        self,
        x: Tensor,
        weight: Weight,
        out: Tensor,
        bias: Tensor | None = None,
        activation: Activation = "none",
    ) -> None:
        cuda_ops.linear(x, weight, out, bias=bias, activation=activation)

    def add(self, x: Tensor, y: Tensor) -> None:
        if x.dtype != paddle.bfloat16:
            x.add_(y)
            return
        for start in range(0, x.shape[0], _ADD_ROWS):  # Paddle adds no bf16 on the CPU
            part = x[start : start + _ADD_ROWS]
            total = part.astype("float32").add_(y[start : start + _ADD_ROWS].astype("float32"))
            cuda_ops.cast(total, part)

    def merge_columns(self, parts: Tensor) -> Tensor:
        world, rows, columns = parts.shape
        return parts.transpose([1, 0, 2]).reshape([rows, world * columns])

    # collectives --------------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor) -> None:
        if self._group is not None:
            self._group.all_reduce(tensor)

    def all_gather(self, tensor: Tensor, out: Tensor) -> None:
        if self._group is not None:
            self._group.all_gather(tensor, out)
        else:
            paddle.assign(tensor, out[0])

    def broadcast(self, tensor: Tensor, root: int) -> None:
        if self._group is not None:
            self._group.broadcast(tensor, root)

    def barrier(self) -> None:
        if self._group is not None:
            self._group.barrier()

    def synchronize(self) -> None:
        pass  # every call above returns when it is done

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


def _host_bits(array: np.ndarray, dtype: DtypeName | None) -> np.ndarray:
    """The array as Paddle takes it: uint16 stands for bf16."""
    if dtype == "bfloat16" and array.dtype == np.float32:
        return bits_from_float32(array)
    host = np.uint16 if dtype == "bfloat16" else dtype
    if (array.dtype == np.uint16) if host is None else (array.dtype != host):
        raise TypeError(f"cannot upload {array.dtype} as {dtype}: convert it first")
    return np.ascontiguousarray(array)


def _meminfo(field: str) -> int:
    """Bytes of one line of /proc/meminfo; physical memory where there is no such file."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _cgroup_limit() -> int:
    """Bytes that the container may use; effectively unbounded without one."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no cgroup v2 here, or "max"
        return 1 << 62

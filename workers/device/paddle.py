"""The device seam on PaddlePaddle: `PaddleCpu`. What is not Paddle's own is in host.py.

Importing this module imports Paddle (seconds), so workers/device/__init__.py does it only when a device is
opened. Its GPU half is paddle_gpu.py.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

import cuda_ops
from workers.device.base import DtypeName, Group, Tensor
from workers.device.bfloat16 import HOST_TYPES, host_array
from workers.device.host import HostDevice


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

framework = paddle  # for paddle_gpu.py: it has to be imported in the same way


class PaddleCpu(HostDevice):
    """One rank on the host's memory and cores. Implements workers.device.base.Device."""

    def __init__(self, rank: int = 0, world: int = 1, group: Group | None = None) -> None:
        super().__init__(rank, world, group)
        paddle.device.set_device("cpu")

    def empty(self, shape: Sequence[int], dtype: DtypeName) -> Tensor:
        return paddle.empty(list(shape), dtype=dtype)

    def zeros(self, shape: Sequence[int], dtype: DtypeName) -> Tensor:
        return paddle.zeros(list(shape), dtype=dtype)

    def upload(self, array: np.ndarray, dtype: DtypeName | None = None) -> Tensor:
        return paddle.to_tensor(host_array(array, dtype))  # uint16 becomes bf16

    def adopt(self, array: np.ndarray, dtype: DtypeName) -> Tensor:
        if array.dtype != HOST_TYPES[dtype]:
            raise TypeError(f"cannot take {array.dtype} for {dtype}")
        if dtype != "bfloat16":
            return paddle.from_dlpack(array)
        return paddle.from_dlpack(array.view(np.int16)).view("bfloat16")  # NumPy has no bf16 to hand over

    def view(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        if 0 in tensor.shape:  # Paddle cannot view what has no elements
            return paddle.empty(list(shape), dtype=tensor.dtype)
        return tensor.view(list(shape))

    def add(self, x: Tensor, y: Tensor) -> None:
        cuda_ops.add(x, y)  # Paddle adds no bf16 on the CPU

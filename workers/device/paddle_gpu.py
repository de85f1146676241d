"""The GPU half of the device seam on PaddlePaddle: `PaddleGpu`. What is not Paddle's own is in gpu.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workers.device.base import DtypeName, Tensor
from workers.device.driver import Driver
from workers.device.gpu import GpuDevice
from workers.device.paddle import framework as paddle


def has_cuda() -> bool:
    """Whether this Paddle is built for GPUs."""
    return bool(paddle.device.is_compiled_with_cuda())


class PaddleGpu(GpuDevice):
    """One rank on one GPU. Implements workers.device.base.Device."""

    def __init__(self, driver: Driver, rank: int = 0, world: int = 1, place: str = "") -> None:
        """`place` is Paddle's name of the GPU; this rank's if empty."""
        self._place = place or f"gpu:{rank}"
        super().__init__(driver, rank, world)

    def _open_stream(self) -> int:
        """Paddle's own stream: it queues on no other unless it is told to at every call."""
        paddle.device.set_device(self._place)
        stream: Any = paddle.device.current_stream(self._place).stream_base
        return int(stream.cuda_stream)

    def _use_stream(self) -> None:
        paddle.device.set_device(self._place)

    def _allocate(self, shape: Sequence[int], dtype: DtypeName) -> Tensor:
        return paddle.empty(list(shape), dtype=dtype)  # raises MemoryError itself

    def zeros(self, shape: Sequence[int], dtype: DtypeName) -> Tensor:
        return self.empty(shape, dtype).zero_()

    def view(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        if 0 in tensor.shape:  # Paddle cannot view what has no elements
            return paddle.empty(list(shape), dtype=tensor.dtype)
        return tensor.view(list(shape))

    def _multiply(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        paddle.matmul(x, weight, transpose_y=True, out=out)

    def add(self, x: Tensor, y: Tensor) -> None:
        x.add_(y)

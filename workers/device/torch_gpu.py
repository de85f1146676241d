"""The GPU half of the device seam on PyTorch: `TorchGpu`. What is not PyTorch's own is in gpu.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.device.base import DtypeName, Tensor
from workers.device.driver import Driver
from workers.device.gpu import GpuDevice
from workers.device.torch import DTYPES


def has_cuda() -> bool:
    """Whether this PyTorch is built for GPUs."""
    return torch.version.cuda is not None


class TorchGpu(GpuDevice):
    """One rank on one GPU. Implements workers.device.base.Device."""

    def __init__(self, driver: Driver, rank: int = 0, world: int = 1, place: str = "") -> None:
        """`place` is PyTorch's name of the GPU; this rank's if empty."""
        self._place = torch.device(place or f"cuda:{rank}")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        super().__init__(driver, rank, world)

    def _open_stream(self) -> int:
        self._torch_stream = torch.cuda.Stream(self._place)
        return self._torch_stream.cuda_stream

    def _use_stream(self) -> None:
        torch.cuda.set_device(self._place)
        torch.cuda.set_stream(self._torch_stream)

    def _allocate(self, shape: Sequence[int], dtype: DtypeName) -> Tensor:
        try:
            return torch.empty(list(shape), dtype=DTYPES[dtype], device=self._place)
        except torch.OutOfMemoryError as error:
            raise MemoryError from error

    def zeros(self, shape: Sequence[int], dtype: DtypeName) -> Tensor:
        return self.empty(shape, dtype).zero_()

    def view(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        return tensor.view(list(shape))

    def _multiply(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        torch.mm(x, weight.t(), out=out)

    def add(self, x: Tensor, y: Tensor) -> None:
        x.add_(y)

"""The device seam on PyTorch: `TorchCpu`. What is not PyTorch's own is in host.py.

Importing this module imports PyTorch, so workers/device/__init__.py does it only when it is asked for.
Its GPU half is torch_gpu.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from workers.device.base import DtypeName, Group, Tensor
from workers.device.bfloat16 import HOST_TYPES, host_array
from workers.device.host import HostDevice

DTYPES: dict[DtypeName, torch.dtype] = {name: getattr(torch, name) for name in HOST_TYPES}


class TorchCpu(HostDevice):
    """One rank on the host's memory and cores. Implements workers.device.base.Device."""

    def __init__(self, rank: int = 0, world: int = 1, group: Group | None = None) -> None:
        super().__init__(rank, world, group)
        torch.set_num_threads(1)  # the ops have threads of their own

    def empty(self, shape: Sequence[int], dtype: DtypeName) -> Tensor:
        return torch.empty(list(shape), dtype=DTYPES[dtype])

    def zeros(self, shape: Sequence[int], dtype: DtypeName) -> Tensor:
        return torch.zeros(list(shape), dtype=DTYPES[dtype])

    def upload(self, array: np.ndarray, dtype: DtypeName | None = None) -> Tensor:
        tensor = torch.tensor(host_array(array, dtype))
        return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor

    def adopt(self, array: np.ndarray, dtype: DtypeName) -> Tensor:
        if array.dtype != HOST_TYPES[dtype]:
            raise TypeError(f"cannot take {array.dtype} for {dtype}")
        return torch.from_numpy(array).view(DTYPES[dtype])

    def view(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        return tensor.view(list(shape))

    def add(self, x: Tensor, y: Tensor) -> None:
        x.add_(y)

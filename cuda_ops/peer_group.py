"""All-reduce between the GPUs of one machine, through memory that the ranks map from each other (CUDA IPC).

For the few rows of a decode step, where a library's collective costs more than the bytes; capturable in
graphs. Larger messages and GPUs without peer access are the framework's collective's business.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cuda_ops.device_library import device_library
from cuda_ops.tensor import Tensor

HANDLE_BYTES = 64


class PeerGroup:
    """One rank's end of 2 to 8 ranks. All ranks make the same calls in the same order, one stream each.

    exchange  gives every rank's bytes for this rank's: [64] uint8 -> [world_size, 64], in rank order, on the
              host; called once, by the constructor of every rank (SharedMemoryGroup.all_gather serves)
    capacity  elements of the largest message; each rank lends 8 bytes of GPU memory per element
    """

    def __init__(
        self, rank: int, world_size: int, capacity: int, exchange: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.capacity = capacity
        own = np.zeros(HANDLE_BYTES, np.uint8)
        self._handle = int(device_library.peers_create(rank, world_size, capacity, own.ctypes.data))
        handles = np.ascontiguousarray(exchange(own), np.uint8)
        if handles.shape != (world_size, HANDLE_BYTES):
            raise ValueError(f"exchange must give [{world_size}, {HANDLE_BYTES}], got {handles.shape}")
        device_library.peers_open(self._handle, handles.ctypes.data)

    def all_reduce(self, x: Tensor, out: Tensor) -> None:
        """Write the sum of every rank's x into out, which may be x; bf16, a multiple of 8 elements.

        Added in rank order in fp32 and rounded once, so every rank gets the same bits every time.
        """
        device_library.peers_all_reduce(self._handle, x, out)

    def all_reduce_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        """residual += that sum (rounded); out = rms_norm(residual) * weight, in one kernel.

        x, residual, out [M, H] bf16 · weight [H] bf16 · H a multiple of 8 up to 16384 · out may be x
        """
        device_library.peers_all_reduce_add_rms_norm(self._handle, x, residual, weight, eps, out)

    def close(self) -> None:
        """Unmap. Every rank must have finished its work on the device, and none may call afterwards."""
        device_library.peers_close(self._handle)

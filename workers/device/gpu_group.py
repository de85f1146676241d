"""The collectives of a rank on a GPU, queued on its stream.

Sums go through cuda_ops.PeerGroup wherever ranks can map each other's memory, in rank order whatever the size
(design D5); else through NCCL. What only moves data is NCCL's. Ranks find each other, and meet for health
probes, through the same group of host memory that CPU ranks use.
"""

from __future__ import annotations

from math import prod
from typing import Protocol, runtime_checkable

import numpy as np

import cuda_ops
from workers.device.base import Group, Tensor
from workers.device.host import dtype_of
from workers.device.nccl import ID_BYTES, Nccl


class Peers(Protocol):
    """Sums through memory that ranks map from each other: cuda_ops.PeerGroup."""

    capacity: int  # elements of one call

    def all_reduce(self, x: Tensor, out: Tensor) -> None: ...

    def all_reduce_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class FusedSums(Protocol):
    """A group that can add the ranks' sum to the residual and normalise in one pass."""

    def all_reduce_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        """See workers.device.base.Device."""


class GpuGroup:
    """Implements workers.device.base.Group, and FusedSums."""

    def __init__(
        self, host: Group, nccl: Nccl, peers: Peers | None, rank: int, world: int, stream: int
    ) -> None:
        self._host, self._nccl, self._peers = host, nccl, peers
        self._rank, self._world, self._stream = rank, world, stream
        unique = nccl.new_id() if rank == 0 else np.zeros(ID_BYTES, np.uint8)
        host.broadcast(unique, 0)
        nccl.join(unique, rank, world)

    def all_reduce(self, tensor: Tensor) -> None:
        if self._peers is None or dtype_of(tensor) != "bfloat16":
            self._nccl.all_reduce(tensor.data_ptr(), prod(tensor.shape), dtype_of(tensor), self._stream)
            return
        rows = self._peers.capacity // prod(tensor.shape[1:])
        for start in range(0, tensor.shape[0], rows):
            part = tensor[start : start + rows]
            self._peers.all_reduce(part, part)

    def all_reduce_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        if self._peers is None or dtype_of(x) != "bfloat16":
            self.all_reduce(x)
            cuda_ops.add_rms_norm(x, residual, weight, eps, out)
            return
        rows = self._peers.capacity // x.shape[1]
        for start in range(0, x.shape[0], rows):
            part = slice(start, start + rows)
            self._peers.all_reduce_add_rms_norm(x[part], residual[part], weight, eps, out[part])

    def all_gather(self, tensor: Tensor, out: Tensor) -> None:
        self._nccl.all_gather(
            tensor.data_ptr(), out.data_ptr(), prod(tensor.shape), dtype_of(tensor), self._stream
        )

    def broadcast(self, tensor: Tensor, root: int) -> None:
        self._nccl.broadcast(tensor.data_ptr(), prod(tensor.shape), dtype_of(tensor), root, self._stream)

    def barrier(self) -> None:
        self._host.barrier()

    def close(self) -> None:
        if self._peers is not None:
            self._peers.close()
        self._nccl.close()
        self._host.close()


def exchange(host: Group, own: np.ndarray, world: int) -> np.ndarray:
    """Every rank's `own` [n], in rank order: [world, n]."""
    everybody = np.empty((world, *own.shape), own.dtype)
    host.all_gather(own, everybody)
    return everybody

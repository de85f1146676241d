"""`python -m tests.workers.fake_gpu_rank <run_dir> <rank>`: a real rank process whose GPU is fake_cuda.py's.

Only libcuda, libnccl and where Paddle puts its tensors are replaced; sums between ranks go through the real
PeerGroup, whose kernels run in the emulator of each process.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

from engine.channels import RunDirectory
from tests.workers.fake_cuda import STREAM, FakeCuda, FakePaddleGpu, streamed_ops
from workers.device import open_gpu
from workers.device.base import BYTES_PER_ELEMENT, DtypeName, Group
from workers.worker import Worker


class AdvancingCuda(FakeCuda):
    """Does a little of its work whenever the host looks whether some is done."""

    def cuEventQuery(self, event: Any) -> int:
        left = self.num_queued() - 3
        self.drain(lambda: self.num_queued() <= left)
        return super().cuEventQuery(event)


class HostNccl:
    """workers.device.nccl.Nccl through host memory, in the order of the fake stream."""

    def __init__(self, cuda: FakeCuda, host: Group) -> None:
        self._cuda, self._host = cuda, host

    def new_id(self) -> np.ndarray:
        return np.arange(128, dtype=np.uint8)

    def join(self, unique: np.ndarray, rank: int, world: int) -> None:
        assert unique.tolist() == list(range(128)), "every rank gets rank 0's id"

    def all_reduce(self, address: int, count: int, dtype: DtypeName, stream: int) -> None:
        assert dtype == "float32", "bf16 goes through the peers"
        self._queue(lambda: self._host.all_reduce(_array(address, count * 4).view(np.float32)), stream)

    def all_gather(self, address: int, out: int, count: int, dtype: DtypeName, stream: int) -> None:
        size = count * BYTES_PER_ELEMENT[dtype]
        everybody = _array(out, 2 * size).reshape(2, size)
        self._queue(lambda: self._host.all_gather(_array(address, size), everybody), stream)

    def broadcast(self, address: int, count: int, dtype: DtypeName, root: int, stream: int) -> None:
        size = count * BYTES_PER_ELEMENT[dtype]
        self._queue(lambda: self._host.broadcast(_array(address, size), root), stream)

    def close(self) -> None: ...

    def _queue(self, work: Any, stream: int) -> None:
        assert stream == STREAM
        self._cuda.queue(work)


def _array(address: int, num_bytes: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_char * num_bytes).from_address(address), np.uint8)


def main(run_directory: str, rank: int) -> int:
    cuda, worker = AdvancingCuda(count=2), Worker(RunDirectory(run_directory), rank)
    groups: list[Group] = []
    open_group = worker._open_group

    def remember() -> Any:
        groups.append(open_group())  # type: ignore[arg-type]
        return groups[0]

    worker._open_group = remember  # type: ignore[method-assign]
    open_gpu.Driver = lambda rank: cuda  # type: ignore[assignment, misc]
    open_gpu.Nccl = lambda: HostNccl(cuda, groups[0])  # type: ignore[assignment, misc]
    open_gpu.gpu_class = lambda framework: (  # type: ignore[assignment]
        lambda cuda, rank, world: FakePaddleGpu(rank, world, None, cuda)
    )
    with streamed_ops():
        return worker.serve()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))

"""The GPU that is measured, or the emulated one that shows that the measuring works.

Memory is PyTorch's in both cases: on the GPU, or on the host while cuda_ops runs its kernels in the emulator.
Everything goes to one stream. Times are the median of several runs between two events, each after the cache
was flushed; the emulator runs once and its times mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

import cuda_ops

Work = Callable[[], object]
FLUSH_BYTES = 256 << 20  # more than any second-level cache
WORKSPACE_BYTES = 3 << 30


@dataclass
class Machine:
    """Where tensors live and how long work takes."""

    device: torch.device
    name: str
    is_emulated: bool
    repeats: int

    def __post_init__(self) -> None:
        size = 1 << 16 if self.is_emulated else FLUSH_BYTES
        self._flush = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self.lend_workspace(1 << 20 if self.is_emulated else WORKSPACE_BYTES)

    def lend_workspace(self, size: int) -> None:
        """Give the ops at least `size` bytes of scratch memory."""
        if len(self._workspace) < size:
            memory = torch.empty(size + 256, dtype=torch.uint8, device=self.device)
            self._workspace = memory[-memory.data_ptr() % 256 :][
                :size
            ]  # the host's memory has less alignment
            cuda_ops.set_workspace(self._workspace)

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Not initialised on a GPU; NaN or the like where the emulator shows what is not written."""
        made = torch.empty(shape, dtype=dtype, device=self.device)
        if self.is_emulated:
            made.view(torch.uint8).fill_(0xFF)
        return made

    def synchronize(self) -> None:
        if not self.is_emulated:
            torch.cuda.synchronize()

    def seconds(self, work: Work, *, is_warm: bool = False) -> float:
        """Median time of `work`, which must only queue; without its cache unless it is_warm."""
        if self.is_emulated:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        for _ in range(3):
            work()
        times = []
        for _ in range(self.repeats):
            if not is_warm:
                self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)

    def compiled(self, function: Callable[..., object]) -> Callable[..., object]:
        """`function` as Triton kernels that PyTorch's compiler makes; itself in the emulator."""
        return function if self.is_emulated else torch.compile(function, dynamic=False)

    def captured(self, work: Work) -> Work:
        """`work` as a CUDA graph, so that its time has no Python in it; `work` itself in the emulator."""
        if self.is_emulated:
            return work
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cuda_ops.set_stream(torch.cuda.current_stream().cuda_stream, self.device.index or 0)
            work()
        cuda_ops.set_stream(torch.cuda.current_stream().cuda_stream, self.device.index or 0)
        return graph.replay


@contextmanager
def open_machine(is_emulated: bool, repeats: int = 20) -> Iterator[Machine]:
    """The first GPU, or the emulated one. Raises ValueError with one sentence where there is no GPU."""
    if is_emulated:
        with cuda_ops.emulated_device():
            try:
                yield Machine(torch.device("cpu"), "emulator", True, 1)
            finally:
                cuda_ops.set_workspace(None)
        return
    cuda_ops.set_stream(0)  # says what is missing
    device = torch.device("cuda:0")
    torch.cuda.set_device(device)
    cuda_ops.set_stream(torch.cuda.current_stream().cuda_stream, 0)
    yield Machine(device, torch.cuda.get_device_name(0), False, repeats)

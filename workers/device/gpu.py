"""A rank on a GPU: what the frameworks' GPU devices have in common.

Memory comes from the framework, arithmetic from cuda_ops; copies, waiting and recorded graphs go through the
driver (driver.py, staging.py). Everything is queued on one stream, so the next call sees what the one
before has done, and nothing waits but downloads. The framework's own part is in torch_gpu.py and
paddle_gpu.py.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from engine.errors import EngineError
from workers.device.base import BYTES_PER_ELEMENT, Activation, Device, DtypeName, Group, Tensor
from workers.device.bfloat16 import host_array
from workers.device.driver import Driver, out_of_memory
from workers.device.gpu_group import FusedSums
from workers.device.host import dtype_of
from workers.device.staging import Downloads, PinnedDownload, PinnedStore, Uploads

if TYPE_CHECKING:
    from cuda_ops import Weight

_ALIGNMENT = 64  # int32 elements: where arrays that travel together begin


class GpuGraph:
    """Recorded launches; implements workers.device.base.Graph."""

    def __init__(self, driver: Driver, stream: int, graph: int) -> None:
        self._driver, self._stream, self._graph = driver, stream, graph

    def replay(self) -> None:
        self._driver.launch(self._graph, self._stream)

    def close(self) -> None:
        self._driver.destroy_graph(self._graph)


class GpuDevice(Device):
    """All of workers.device.base.Device but what a framework has to do: make tensors, multiply, add.

    A framework's half also gives `_allocate`, `_open_stream`, `_use_stream` and `_multiply`. The bits of a
    row of `_multiply` may depend on how many rows there are; so the decoder's weights are tiled
    (workers/tiling.py), and only whole images, whose rows are always the same, meet weights that are not.
    """

    def __init__(self, driver: Driver, rank: int = 0, world: int = 1) -> None:
        """Collectives come later, with `join`: they need the device's stream."""
        self.name = driver.name
        self.is_gpu = True
        self.can_record = True
        self.rank = rank
        self.world = world
        self.slowest_flops = 1e12
        self._driver = driver
        self._group: Group | None = None
        self._fused_sums: FusedSums | None = None  # the group, if it can
        self._scratch: Tensor | None = None  # what ops share while they run
        self._graphs: list[GpuGraph] = []
        self._stores: list[PinnedStore] = []
        self._is_capturing = False
        self._threads = threading.local()  # which threads have entered
        driver.enter()
        self.stream = self._open_stream()
        self._uploads = Uploads(driver, self.stream)
        self._downloads = Downloads(driver, self.stream)
        self.enter_thread()

    def join(self, group: Group) -> None:
        """Meet the other ranks through `group` from now on."""
        self._group = group
        self._fused_sums = group if isinstance(group, FusedSums) else None

    # what a framework gives -----------------------------------------------------------------------------

    @abstractmethod
    def _allocate(self, shape: Sequence[int], dtype: DtypeName) -> Tensor:
        """An uninitialised tensor. Raises MemoryError when there is no room."""

    @abstractmethod
    def _open_stream(self) -> int:
        """The stream that everything is queued on, as the driver knows it."""

    @abstractmethod
    def _use_stream(self) -> None:
        """Make the calling thread's framework queue on it."""

    @abstractmethod
    def _multiply(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """out [M, N] = x [M, K] @ weight [N, K]^T, all bf16."""

    # memory and copies ----------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: DtypeName) -> Tensor:
        self.enter_thread()
        try:
            return self._allocate(shape, dtype)
        except MemoryError:
            wanted = prod(shape) * BYTES_PER_ELEMENT[dtype]
            sentence = out_of_memory(self.name, *self._driver.memory())
            raise EngineError(f"{sentence} ({wanted / 2**20:,.0f} MiB more were wanted)") from None

    def upload(self, array: np.ndarray, dtype: DtypeName | None = None) -> Tensor:
        bits = host_array(array, dtype)
        tensor = self.empty(bits.shape, dtype or str(bits.dtype))  # type: ignore[arg-type]
        self._send(bits, tensor)
        return tensor

    def upload_all(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        starts = np.cumsum([0] + [-(-array.size // _ALIGNMENT) * _ALIGNMENT for array in arrays])
        together = np.empty(int(starts[-1]), np.int32)
        for start, array in zip(starts, arrays, strict=False):
            together[start : start + array.size] = array.reshape(-1)
        tensor = self.upload(together)
        return [
            self.view(tensor[int(start) : int(start) + array.size], array.shape)
            for start, array in zip(starts, arrays, strict=False)
        ]

    def upload_again(self, name: str, array: np.ndarray) -> Tensor:
        return self.upload(array)  # the step before may still be reading its own

    def write(self, tensor: Tensor, array: np.ndarray) -> None:
        if list(array.shape) != list(tensor.shape) or not tensor.is_contiguous():
            raise ValueError(f"cannot write {array.shape} into a tensor of shape {list(tensor.shape)}")
        self._send(host_array(array, dtype_of(tensor)), tensor)

    def write_corner(self, tensor: Tensor, array: np.ndarray) -> None:
        self._refuse_while_capturing("an upload")
        self._uploads.send_rows(host_array(array, "int32"), tensor.data_ptr(), 4 * int(tensor.shape[1]))

    def download(self, tensor: Tensor) -> np.ndarray:
        return self.download_later(tensor).result()

    def download_later(self, tensor: Tensor) -> PinnedDownload:
        self._refuse_while_capturing("a download")
        self.enter_thread()
        if not tensor.is_contiguous():
            raise ValueError(f"cannot download a tensor of shape {list(tensor.shape)} that is not contiguous")
        return self._downloads.start(tensor.data_ptr(), tuple(tensor.shape), dtype_of(tensor))

    def host_bits(self, tensor: Tensor) -> np.ndarray:
        return self.download_later(tensor).bits()

    def adopt(self, array: np.ndarray, dtype: DtypeName) -> Tensor:
        return self.upload(array, dtype)

    def host_store(self, num_bytes: int) -> PinnedStore:
        self.enter_thread()
        self._stores.append(PinnedStore(self._driver, self.stream, num_bytes))
        return self._stores[-1]

    def lend_scratch(self, num_bytes: int) -> None:
        self._scratch = self.empty((num_bytes,), "uint8")
        cuda_ops.set_workspace(self._scratch)

    def free_memory(self) -> int:
        return self._driver.memory()[0]

    def total_memory(self) -> int:
        return self._driver.memory()[1]

    # arithmetic -----------------------------------------------------------------------------------------

    def linear(
        self,
        x: Tensor,
        weight: Weight | cuda_ops.TiledWeight,
        out: Tensor,
        bias: Tensor | None = None,
        activation: Activation = "none",
    ) -> None:
        if isinstance(weight, cuda_ops.TiledWeight):
            cuda_ops.linear(x, weight, out, bias=bias, activation=activation)
            return
        self._multiply(x, weight.data, out)
        if bias is not None or activation != "none":
            cuda_ops.bias_activation(out, bias, activation)

    # recorded work --------------------------------------------------------------------------------------

    def capture(self, work: Callable[[], None]) -> GpuGraph:
        with self._recording() as graphs:
            work()
        self._graphs += graphs
        return graphs[0]

    @contextmanager
    def _recording(self) -> Iterator[list[GpuGraph]]:
        """The list has the graph when the block ends."""
        graphs: list[GpuGraph] = []
        self._driver.begin_capture(self.stream)
        self._is_capturing = True
        try:
            yield graphs
        except BaseException:
            self._driver.drop_capture(self.stream)
            raise
        finally:
            self._is_capturing = False
        graphs.append(GpuGraph(self._driver, self.stream, self._driver.end_capture(self.stream)))

    # collectives ----------------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor) -> None:
        if self._group is not None:
            self._group.all_reduce(tensor)

    def all_reduce_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        if self._fused_sums is not None:
            self._fused_sums.all_reduce_add_rms_norm(x, residual, weight, eps, out)
            return
        self.all_reduce(x)
        cuda_ops.add_rms_norm(x, residual, weight, eps, out)

    def all_gather(self, tensor: Tensor, out: Tensor) -> None:
        if self._group is None:
            raise EngineError("there is nothing to gather from one rank on a GPU")
        self._group.all_gather(tensor, out)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        if self._group is not None:
            self._group.broadcast(tensor, root)

    def barrier(self) -> None:
        self.synchronize()  # a health probe shall see that the GPU is well, too
        if self._group is not None:
            self._group.barrier()

    def synchronize(self) -> None:
        self._refuse_while_capturing("waiting")
        self._driver.wait_for_stream(self.stream)

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = self._fused_sums = None
        for graph in self._graphs:
            graph.close()
        self._graphs.clear()
        for store in self._stores:
            store.close()
        self._uploads.close()
        self._downloads.close()

    # ----------------------------------------------------------------------------------------------------

    def _send(self, bits: np.ndarray, tensor: Tensor) -> None:
        self._refuse_while_capturing("an upload")
        self.enter_thread()
        if bits.size:
            self._uploads.send(bits, tensor.data_ptr())

    def enter_thread(self) -> None:
        if not getattr(self._threads, "has_entered", False):
            self._driver.enter()
            self._use_stream()
            cuda_ops.set_stream(self.stream, self._driver.index)
            cuda_ops.set_workspace(self._scratch)
            self._threads.has_entered = True

    def _refuse_while_capturing(self, what: str) -> None:
        if self._is_capturing:
            raise EngineError(f"{what} cannot be part of recorded work")

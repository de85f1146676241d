"""A GPU for tests: libcuda's interface on host memory, with streams that do nothing until somebody waits.

`FakeCuda` stands in for the library that workers/device/driver.py loads. `FakePaddleGpu` and `torch_gpu()`
are the real devices on it, their tensors in host memory. Inside `streamed_ops()` the ops are the CUDA
kernels, run by the emulator; they are queued, as copies and collectives are, and done when the host waits. So
a buffer that is overwritten too early, or a result that is read too early, is wrong here as it would be on a
GPU. A captured stream records what is queued; a replay queues it again.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import cuda_ops
from workers.device.base import BYTES_PER_ELEMENT, DtypeName, Group, Tensor
from workers.device.driver import Driver
from workers.device.gpu import GpuDevice
from workers.device.op_watch import watched_ops
from workers.device.paddle import PaddleCpu
from workers.device.paddle_gpu import PaddleGpu

Work = Callable[[], None]
_ALIGNMENT = 256  # bytes, of all memory on a GPU
STREAM = 7  # any number: what the framework says its stream is

_NOT_READY, _CAPTURING = 600, 900
_BY_STREAM = threading.local()  # .queue: where the ops of this thread go


class FakeCuda:
    """The functions of libcuda that Octet calls, with ctypes arguments, for `count` GPUs."""

    def __init__(
        self, count: int = 1, capability: tuple[int, int] = (9, 0), memory: int = 1 << 30, init: int = 0
    ) -> None:
        self.count, self.capability, self.memory, self.init = count, capability, memory, init
        self.failure = 0  # what every wait answers once it is set, as after a kernel that went wrong
        self.is_in_step = False  # waiting is an error meanwhile
        self.num_launches = 0  # of graphs
        self.num_uploaded = 0  # bytes
        # Memory that the host has freed while work on it is queued: a framework gives it only to later work.
        self.kept: list[Tensor] = []
        self.before_work: Work = lambda: None  # what the thread that waits has to do first
        self._queues: dict[int, list[Work]] = defaultdict(list)
        self._recording: dict[int, list[Work]] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._events: dict[int, bool] = {}
        self._pinned: dict[int, Any] = {}
        self._names = itertools.count(1)

    # work -----------------------------------------------------------------------------------------------

    def queue(self, work: Work, stream: int = STREAM) -> None:
        (self._recording[stream] if stream in self._recording else self._queues[stream]).append(work)

    def num_queued(self, stream: int = STREAM) -> int:
        return len(self._queues[stream])

    def drain(self, until: Callable[[], bool] = lambda: False) -> None:
        queue = self._queues[STREAM]
        self.before_work()
        while queue and not until():
            queue.pop(0)()
        if not queue:
            self.kept.clear()

    def _wait(self, until: Callable[[], bool] = lambda: False) -> int:
        assert not self.is_in_step, "the host waited for the GPU inside a step"
        if self._recording:
            return _CAPTURING
        self.drain(until)
        return self.failure

    # the library ----------------------------------------------------------------------------------------

    def cuInit(self, flags: Any) -> int:
        return self.init

    def cuDeviceGetCount(self, count: Any) -> int:
        return _give(count, self.count)

    def cuDeviceGet(self, device: Any, index: Any) -> int:
        return _give(device, index.value)

    def cuDeviceGetName(self, name: Any, size: Any, device: Any) -> int:
        name.value = b"Fake H800"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: Any, device: Any) -> int:
        return _give(value, self.capability[attribute.value - 75])

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        return _give(context, 1)

    def cuCtxSetCurrent(self, context: Any) -> int:
        _BY_STREAM.has_context = True
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        _give(free, self.memory // 4)
        return _give(total, self.memory)

    def cuMemHostAlloc(self, address: Any, size: Any, flags: Any) -> int:
        memory = ctypes.create_string_buffer(size.value)
        self._pinned[ctypes.addressof(memory)] = memory
        return _give(address, ctypes.addressof(memory))

    def cuMemFreeHost(self, address: Any) -> int:
        del self._pinned[address.value]
        return 0

    def cuMemcpyHtoDAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> int:
        self.num_uploaded += size.value
        return self._copy(to.value, source.value, size.value, stream.value)

    def cuMemcpyDtoHAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> int:
        return self._copy(to.value, source.value, size.value, stream.value)

    def cuMemcpy2DAsync_v2(self, how: Any, stream: Any) -> int:
        copy = how._obj
        for row in range(copy.height):
            to = copy.dst_device + row * copy.dst_pitch
            self._copy(to, copy.src_host + row * copy.src_pitch, copy.width_in_bytes, stream.value)
        return 0

    def _copy(self, to: int, source: int, size: int, stream: int) -> int:
        assert _BY_STREAM.has_context, "this thread has no context"
        self.queue(lambda: ctypes.memmove(to, source, size) and None, stream)
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:
        return self._wait()

    def cuEventCreate(self, event: Any, flags: Any) -> int:
        name = next(self._names)
        self._events[name] = True
        return _give(event, name)

    def cuEventRecord(self, event: Any, stream: Any) -> int:
        name = event.value
        self._events[name] = False
        self.queue(lambda: self._events.__setitem__(name, True), stream.value)
        return 0

    def cuEventQuery(self, event: Any) -> int:
        return self.failure or (0 if self._events[event.value] else _NOT_READY)

    def cuEventSynchronize(self, event: Any) -> int:
        if self._events[event.value]:
            return self.failure
        return self._wait(lambda: self._events[event.value])

    def cuEventDestroy_v2(self, event: Any) -> int:
        del self._events[event.value]
        return 0

    def cuStreamBeginCapture_v2(self, stream: Any, mode: Any) -> int:
        self._recording[stream.value] = []
        return 0

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:
        name = next(self._names)
        self._graphs[name] = self._recording.pop(stream.value)
        return _give(graph, name)

    def cuGraphInstantiateWithFlags(self, launchable: Any, graph: Any, flags: Any) -> int:
        name = next(self._names)
        self._graphs[name] = list(self._graphs[graph.value])
        return _give(launchable, name)

    def cuGraphDestroy(self, graph: Any) -> int:
        del self._graphs[graph.value]
        return 0

    cuGraphExecDestroy = cuGraphDestroy

    def cuGraphLaunch(self, graph: Any, stream: Any) -> int:
        self.num_launches += 1
        for work in self._graphs[graph.value]:
            self.queue(work, stream.value)
        return 0

    def cuGetErrorString(self, code: Any, words: Any) -> int:
        known = {2: b"out of memory", 700: b"an illegal memory access was encountered"}
        return _give(words, known.get(code.value, b"something else"))


def _give(reference: Any, value: Any) -> int:
    reference._obj.value = value
    return 0


class FakeGroup:
    """Collectives that are queued; what the host does itself is done at once, as in gpu_group.py."""

    def __init__(self, cuda: FakeCuda, group: Group) -> None:
        self._cuda, self._group = cuda, group

    def all_reduce(self, tensor: Tensor) -> None:
        self._cuda.queue(lambda: self._group.all_reduce(tensor))

    def all_gather(self, tensor: Tensor, out: Tensor) -> None:
        self._cuda.queue(lambda: self._group.all_gather(tensor, out))

    def broadcast(self, tensor: Tensor, root: int) -> None:
        self._cuda.queue(lambda: self._group.broadcast(tensor, root))

    def barrier(self) -> None:
        self._group.barrier()

    def close(self) -> None:
        self._group.close()


class _OnHost(GpuDevice):
    """What the fakes of both frameworks have in common; a rank's thread may change from call to call."""

    def __init__(
        self, rank: int = 0, world: int = 1, group: Group | None = None, cuda: FakeCuda | None = None
    ) -> None:
        self.cuda = cuda or FakeCuda(world)
        self.cuda.before_work = self.enter_thread
        super().__init__(Driver(rank, self.cuda), rank, world, "cpu")  # type: ignore[call-arg, arg-type]
        if group is not None:
            self.join(FakeGroup(self.cuda, group))

    def _open_stream(self) -> int:
        return STREAM

    def _use_stream(self) -> None:
        pass

    def enter_thread(self) -> None:
        _BY_STREAM.has_context = True
        _BY_STREAM.queue = self.cuda.queue
        cuda_ops.set_workspace(self._scratch)  # a thread's own, as on a GPU

    def _allocate(self, shape: Sequence[int], dtype: DtypeName) -> Tensor:
        """As aligned as on a GPU."""
        size, count = BYTES_PER_ELEMENT[dtype], prod(shape)
        memory = super()._allocate((count + _ALIGNMENT // size,), dtype)
        self.cuda.kept.append(memory)
        first = -memory.data_ptr() % _ALIGNMENT // size
        return self.view(memory[first : first + count], shape)

    def _multiply(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        self.cuda.queue(lambda: super(_OnHost, self)._multiply(x, weight, out))

    def add(self, x: Tensor, y: Tensor) -> None:
        self.cuda.queue(lambda: super(_OnHost, self).add(x, y))


class FakePaddleGpu(_OnHost, PaddleGpu):
    """The Paddle device on a fake GPU. Paddle computes no bf16 on a CPU: NumPy does it here."""

    def _multiply(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        host = PaddleCpu()
        self.cuda.queue(lambda: host.write(out, host.download(x) @ host.download(weight).T))

    def add(self, x: Tensor, y: Tensor) -> None:
        host = PaddleCpu()
        self.cuda.queue(lambda: host.write(x, host.download(x) + host.download(y)))


def torch_gpu() -> type[GpuDevice]:
    """The PyTorch device on a fake GPU. Skips the test where PyTorch is not installed."""
    import pytest

    pytest.importorskip("torch", reason="PyTorch is not installed")
    from workers.device.torch_gpu import TorchGpu

    class FakeTorchGpu(_OnHost, TorchGpu):
        pass

    return FakeTorchGpu


@contextmanager
def streamed_ops() -> Iterator[None]:
    """Ops of the emulated device are queued on the stream of the device that the thread uses."""
    with cuda_ops.emulated_device(), watched_ops(_queued):
        yield


def _queued(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: _BY_STREAM.queue(lambda: op(*arguments))

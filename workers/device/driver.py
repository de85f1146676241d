"""The CUDA driver, as far as a rank speaks to it itself: copies, events, recorded graphs.

Through libcuda, which comes with the driver and has one interface whatever CUDA a framework was built for;
its streams and pointers are those of the frameworks. Every failure becomes a sentence here. Tests put a
library of their own in its place (tests/workers/fake_cuda.py).
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from engine.errors import ConfigError, EngineError

OLDEST = (8, 0)  # compute capability that the kernels need

_OUT_OF_MEMORY, _NOT_READY = 2, 600
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_WITHOUT_TIMING = 0x02  # CU_EVENT_DISABLE_TIMING
_PORTABLE = 0x01  # CU_MEMHOSTALLOC_PORTABLE
_HOST, _DEVICE = 1, 2  # CU_MEMORYTYPE_*
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may do what they like meanwhile


class Copy2d(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = [
        ("src_x", c_size_t),
        ("src_y", c_size_t),
        ("src_type", c_int),
        ("src_host", c_void_p),
        ("src_device", c_uint64),
        ("src_array", c_void_p),
        ("src_pitch", c_size_t),
        ("dst_x", c_size_t),
        ("dst_y", c_size_t),
        ("dst_type", c_int),
        ("dst_host", c_void_p),
        ("dst_device", c_uint64),
        ("dst_array", c_void_p),
        ("dst_pitch", c_size_t),
        ("width_in_bytes", c_size_t),
        ("height", c_size_t),
    ]


class Driver:
    """Calls of libcuda on one GPU. Addresses, streams and events are plain integers."""

    def __init__(self, index: int, library: Any | None = None) -> None:
        """`index` is among the GPUs that CUDA_VISIBLE_DEVICES leaves. Raises ConfigError for an unfit GPU."""
        self._cuda = library or _load()
        self.index = index
        self.name = f"gpu:{index}"
        if code := self._cuda.cuInit(c_uint(0)):
            raise ConfigError(
                f"--device gpu: the NVIDIA driver does not start ({self._words(code)}); see nvidia-smi"
            )
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        if index >= count.value:
            raise ConfigError(
                f"rank {index} needs a GPU of its own, but {count.value} can be seen; lower "
                "--tensor-parallel-size, or check nvidia-smi and CUDA_VISIBLE_DEVICES"
            )
        device, context, name = c_int(), c_void_p(), ctypes.create_string_buffer(96)
        self._call("cuDeviceGet", byref(device), c_int(index))
        self._call("cuDeviceGetName", name, c_int(len(name)), device)
        self.name = f"gpu:{index} {name.value.decode()}"
        self._check_age(device)
        self._call("cuDevicePrimaryCtxRetain", byref(context), device)  # the one that frameworks use
        self._context = context

    def _check_age(self, device: c_int) -> None:
        major, minor = c_int(), c_int()
        self._call("cuDeviceGetAttribute", byref(major), c_int(_MAJOR), device)
        self._call("cuDeviceGetAttribute", byref(minor), c_int(_MINOR), device)
        if (major.value, minor.value) < OLDEST:
            raise ConfigError(
                f"{self.name} has compute capability {major.value}.{minor.value}, but the kernels need "
                f"{OLDEST[0]}.{OLDEST[1]} or newer (A100, L20, H20, H800, ...); use --device cpu"
            )

    def enter(self) -> None:
        """Let the calling thread use the GPU; needed once in every thread."""
        self._call("cuCtxSetCurrent", self._context)

    # memory -------------------------------------------------------------------------------------------

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the GPU, everybody's use counted."""
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def allocate_pinned(self, num_bytes: int) -> int:
        """Host memory that copies can run from and to while the host goes on."""
        address = c_void_p()
        self._call("cuMemHostAlloc", byref(address), c_size_t(num_bytes), c_uint(_PORTABLE))
        assert address.value is not None
        return address.value

    def free_pinned(self, address: int) -> None:
        self._call("cuMemFreeHost", c_void_p(address))

    def copy_in(self, address: int, host: int, num_bytes: int, stream: int) -> None:
        """Queue a copy from pinned host memory to the device."""
        self._call(
            "cuMemcpyHtoDAsync_v2", c_uint64(address), c_void_p(host), c_size_t(num_bytes), c_void_p(stream)
        )

    def copy_out(self, host: int, address: int, num_bytes: int, stream: int) -> None:
        """Queue a copy from the device to pinned host memory."""
        self._call(
            "cuMemcpyDtoHAsync_v2", c_void_p(host), c_uint64(address), c_size_t(num_bytes), c_void_p(stream)
        )

    def copy_in_rows(
        self, address: int, pitch: int, host: int, row_bytes: int, num_rows: int, stream: int
    ) -> None:
        """As `copy_in` of rows that lie `pitch` bytes apart on the device, and without gaps on the host."""
        how = Copy2d(
            src_type=_HOST,
            src_host=host,
            src_pitch=row_bytes,
            dst_type=_DEVICE,
            dst_device=address,
            dst_pitch=pitch,
            width_in_bytes=row_bytes,
            height=num_rows,
        )
        self._call("cuMemcpy2DAsync_v2", byref(how), c_void_p(stream))

    # waiting ------------------------------------------------------------------------------------------

    def wait_for_stream(self, stream: int) -> None:
        self._call("cuStreamSynchronize", c_void_p(stream))

    def create_event(self) -> int:
        event = c_void_p()
        self._call("cuEventCreate", byref(event), c_uint(_WITHOUT_TIMING))
        assert event.value is not None
        return event.value

    def record(self, event: int, stream: int) -> None:
        """The event is done when everything queued so far is."""
        self._call("cuEventRecord", c_void_p(event), c_void_p(stream))

    def is_done(self, event: int) -> bool:
        code = self._cuda.cuEventQuery(c_void_p(event))
        if code not in (0, _NOT_READY):
            self._fail("cuEventQuery", code)
        return code == 0

    def wait_for_event(self, event: int) -> None:
        """Return once the event is done; other threads of this process run meanwhile."""
        self._call("cuEventSynchronize", c_void_p(event))

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy_v2", c_void_p(event))

    # recorded work ------------------------------------------------------------------------------------

    def begin_capture(self, stream: int) -> None:
        self._call("cuStreamBeginCapture_v2", c_void_p(stream), c_int(_THREAD_LOCAL))

    def end_capture(self, stream: int) -> int:
        """The graph that can be launched. Raises EngineError when the work could not be recorded."""
        graph, launchable = c_void_p(), c_void_p()
        self._call("cuStreamEndCapture", c_void_p(stream), byref(graph))
        self._call("cuGraphInstantiateWithFlags", byref(launchable), graph, c_uint64(0))
        self._call("cuGraphDestroy", graph)
        assert launchable.value is not None
        return launchable.value

    def drop_capture(self, stream: int) -> None:
        """End a capture that failed, so that the stream can be used again."""
        graph = c_void_p()
        if self._cuda.cuStreamEndCapture(c_void_p(stream), byref(graph)) == 0 and graph.value:
            self._cuda.cuGraphDestroy(graph)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cuGraphLaunch", c_void_p(graph), c_void_p(stream))

    def destroy_graph(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", c_void_p(graph))

    # failures -----------------------------------------------------------------------------------------

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._cuda, name)(*arguments):
            self._fail(name, code)

    def _fail(self, name: str, code: int) -> None:
        if code == _OUT_OF_MEMORY:
            raise EngineError(out_of_memory(self.name, *self._free_memory()))
        raise EngineError(
            f"{self.name} failed: {self._words(code)}, noticed by {name}; the kernel that did it ran before. "
            "Start again with OCTET_CHECK_OPS=1 to learn its name"
        )

    def _free_memory(self) -> tuple[int, int]:
        """As `memory`, but never fails."""
        free, total = c_size_t(), c_size_t()
        self._cuda.cuMemGetInfo_v2(byref(free), byref(total))
        return free.value, total.value

    def _words(self, code: int) -> str:
        """'CUDA error 700: an illegal memory access was encountered'."""
        words = ctypes.c_char_p()
        self._cuda.cuGetErrorString(c_int(code), byref(words))
        return f"CUDA error {code}: {(words.value or b'unknown').decode()}"


def out_of_memory(name: str, free: int, total: int) -> str:
    return (
        f"{name} is out of memory: {free / 2**30:.2f} of {total / 2**30:.2f} GiB are free. Is another "
        "process using it? Else lower --gpu-memory-utilization, --max-num-batched-tokens or --image-cache"
    )


def _load() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise ConfigError(
            "--device gpu: no NVIDIA driver here (libcuda.so.1 is missing); install it, start the container "
            "with GPUs, or leave --device out"
        ) from None

"""The library of the CUDA bodies: where it comes from, and what its calls need beside their arguments.

On a GPU it is what nvcc makes of csrc/gpu (build_gpu.py), loaded when the first tensor on a GPU is met. In
tests it may be the emulator's (emulator.py): inside `emulated_device()` host tensors count as the device's,
and every op runs the same boundary and the same kernels on them. Nothing here imports a framework.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cuda_ops.ffi import import_tvm_ffi
from cuda_ops.tensor import Tensor

_HINTS = {  # ops whose device form takes something that the CPU's does not
    "linear": "its weight must be a TiledWeight (cuda_ops.tile_weight)",
    "moe_experts": "its weights must be TiledWeights (cuda_ops.tile_weight)",
    "paged_attention": "it needs a plan (cuda_ops.plan_attention)",
}


class DeviceLibrary:
    """Attributes are the exported functions of csrc/gpu_boundary, looked up at their first use."""

    is_emulated = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        function = self.find(name)
        setattr(self, name, function)  # the next look-up does not come here
        return function

    def find(self, name: str) -> Callable[..., Any]:
        """The function `name`; RuntimeError says why a tensor on a GPU cannot be served."""
        module = _load(self.is_emulated)
        try:
            return getattr(module, name)  # type: ignore[no-any-return]
        except AttributeError:
            hint = _HINTS.get(name, "it has no CUDA body")
            raise RuntimeError(f"{name} was called with tensors on a GPU: {hint}") from None

    def choose(self, is_emulated: bool) -> None:
        """Take functions from the emulator's library, or from nvcc's, from now on."""
        if is_emulated != self.is_emulated:
            self.__dict__.clear()
            self.is_emulated = is_emulated


device_library = DeviceLibrary()
_modules: dict[bool, Any] = {}
_lent = threading.local()


def _load(is_emulated: bool) -> Any:
    if is_emulated not in _modules:
        tvm_ffi = import_tvm_ffi()
        if is_emulated:
            from cuda_ops.emulator import emulated_library_path

            path = emulated_library_path()
        else:
            from cuda_ops.build_gpu import gpu_library_path

            path = gpu_library_path()
        _modules[is_emulated] = tvm_ffi.load_module(str(path))
    return _modules[is_emulated]


def set_stream(handle: int, device: int = 0) -> None:
    """Queue this thread's calls on the stream `handle` (cudaStream_t as an integer; 0: the default) of a GPU.

    Until it is called they go to the default stream of GPU 0. Nothing synchronises; under graph capture give
    the capturing stream. Raises ValueError if there is no driver, no such GPU, or one older than sm_80.
    """
    device_library.set_stream(handle, device)


def set_workspace(memory: Tensor | None) -> None:
    """Lend this thread's calls scratch memory: uint8 on the device, aligned to 256 bytes.

    Ops that need some (the `..._workspace_bytes` functions say how much) share it, because they follow each
    other in one stream; none allocates. It is kept until this thread lends another or ends; who captures
    graphs keeps it for as long as they are replayed.
    """
    device_library.set_workspace(memory)
    _lent.memory = memory  # the library has but its address


@contextmanager
def emulated_device() -> Iterator[None]:
    """Run every op of the block on the emulated GPU, whatever host memory its tensors live in. For tests.

    Wrong kernels (races, divergence, touching memory that is no argument) raise ValueError with the place.
    """
    from cuda_ops.library import library

    before = device_library.is_emulated
    device_library.choose(True)
    library.set_device_library(device_library.find)
    library.emulate_device(True)
    try:
        yield
    finally:
        library.emulate_device(False)
        device_library.choose(before)
        library.set_device_library(device_library.find)

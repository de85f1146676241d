"""Looks at the machine before a weight is read: GPUs and their driver, shared memory.

Every shortage is one sentence that says what is short and what to do. Whether memory suffices is the
plan's business (plan_server.py gets the machine from here); room for the weight cache is asked where it is
written.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import msgspec

from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.plan_machine import Machine, this_host
from engine.run_directory import choose_root

_SHARED_BYTES = 64 << 20  # pages that ranks meet in, and the patches of a picture
_SHARED_PER_RANK = 1 << 20
_NAME_BYTES = 96
_OLDEST = (8, 0)  # compute capability that the kernels need; workers/device/driver.py asks again

_INT8_BLOCK = 8  # tokens of the smallest block that attention over an int8 cache reads


class _NvmlMemory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def choose_device(config: ServerConfig) -> tuple[ServerConfig, list[str]]:
    """The settings with `device` decided, and what GPUs compute in; the lines to log.

    --device auto takes GPUs where there are enough for every rank and a framework that computes on them.
    """
    notes: list[str] = []
    if config.device == "auto":
        device = "gpu" if _has_gpus(config.tensor_parallel_size) and _has_gpu_framework() else "cpu"
        notes += ["GPUs found; --device cpu would not use them"] if device == "gpu" else []
        config = msgspec.structs.replace(config, device=device)
    if config.device == "gpu":
        _refuse_what_kernels_do_not_take(config)
        config = msgspec.structs.replace(config, dtype="bfloat16")
    return config, notes


def _refuse_what_kernels_do_not_take(config: ServerConfig) -> None:
    """Settings that a CPU serves and a GPU does not. Raises ConfigError."""
    if config.dtype == "float32":
        raise ConfigError("--dtype float32 is for CPUs; GPUs compute in bfloat16: leave --dtype out")
    if config.block_size & (config.block_size - 1):
        raise ConfigError(
            f"--block-size {config.block_size} is for CPUs: GPUs need a power of two, as the default is"
        )
    if config.kv_cache_dtype == "int8" and config.block_size < _INT8_BLOCK:
        raise ConfigError(
            f"--kv-cache-dtype int8 needs --block-size {_INT8_BLOCK} or more on GPUs, got {config.block_size}"
        )


def _has_gpu_framework() -> bool:
    """Whether PaddlePaddle or PyTorch is installed in a build for CUDA; neither is imported here."""
    installed = {str(one.name).lower() for one in distributions()}
    has_runtime = any(name.startswith("nvidia-cuda-runtime") for name in installed)
    return "paddlepaddle-gpu" in installed or ("torch" in installed and has_runtime)


def _has_gpus(world: int) -> bool:
    try:
        find_gpus(world)
    except ConfigError:
        return False
    return True


def check_machine(config: ServerConfig) -> Machine:
    """The memory that the ranks will have. Raises ConfigError for what makes a start hopeless."""
    check_room_for_shared_files(config.tensor_parallel_size, choose_root())
    if config.device == "gpu":
        return find_gpus(config.tensor_parallel_size)
    return this_host()


def check_room_for_shared_files(world: int, folder: Path) -> None:
    """`folder` is where the run directory will lie: /dev/shm, or the temporary folder where that is small."""
    needed = _SHARED_BYTES + world * _SHARED_PER_RANK
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    if free < needed:
        raise ConfigError(
            f"{folder} has {free >> 20} MiB free, but processes and pictures need {needed >> 20} MiB there; "
            "make room, set TMPDIR to a larger folder, or start the container with --shm-size 1g"
        )


def find_gpus(world: int) -> Machine:
    """The poorest of the first `world` GPUs.

    Raises ConfigError when the driver or a GPU is missing, or one is too old.
    """
    memory = []
    with _nvml() as nvml:
        indices = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), _count(nvml))
        if len(indices) < world:
            raise ConfigError(
                f"--tensor-parallel-size {world} needs as many GPUs, but {len(indices)} can be seen; "
                "check nvidia-smi and CUDA_VISIBLE_DEVICES"
            )
        memory = [_ask(nvml, index) for index in indices[:world]]
    return min(memory, key=lambda machine: machine.available)


def visible_gpus(variable: str | None, count: int) -> list[int]:
    """Indices that CUDA_VISIBLE_DEVICES leaves of `count` GPUs; names instead of numbers count in order."""
    if variable is None:
        return list(range(count))
    named = [part.strip() for part in variable.split(",") if part.strip()]
    if all(part.isdigit() for part in named):
        return [int(part) for part in named if int(part) < count]
    return list(range(min(len(named), count)))


@contextlib.contextmanager
def _nvml() -> Iterator[ctypes.CDLL]:
    """The driver's management library, initialised."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        raise ConfigError(
            "--device gpu: no NVIDIA driver here (libnvidia-ml.so.1 is missing); install it, start the "
            "container with GPUs, or leave --device out"
        ) from None
    if code := nvml.nvmlInit_v2():
        raise ConfigError(
            f"--device gpu: the NVIDIA driver does not answer (NVML error {code}); see nvidia-smi"
        )
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _count(nvml: ctypes.CDLL) -> int:
    count = ctypes.c_uint()
    _check(nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)))
    return count.value


def _ask(nvml: ctypes.CDLL, index: int) -> Machine:
    handle, memory = ctypes.c_void_p(), _NvmlMemory()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)))
    _check(nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)))
    _check(nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(_NAME_BYTES)))
    _check(nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)))
    if (major.value, minor.value) < _OLDEST:
        raise ConfigError(
            f"gpu:{index} {name.value.decode()} has compute capability {major.value}.{minor.value}, but the "
            f"kernels need {_OLDEST[0]}.{_OLDEST[1]} or newer (A100, L20, H20, H800, ...); choose others "
            "with CUDA_VISIBLE_DEVICES, or say --device cpu"
        )
    return Machine(f"gpu:{index} {name.value.decode()}", memory.total, is_host=False, available=memory.free)


def _check(code: int) -> None:
    if code:
        raise ConfigError(
            f"the NVIDIA driver does not tell about its GPUs (NVML error {code}); see nvidia-smi"
        )

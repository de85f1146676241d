"""A rank on the host's memory and cores: what the frameworks' CPU devices have in common.

Memory comes from the framework, arithmetic from cuda_ops; every call returns when it is done. The framework's
own part is in paddle.py and torch.py.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from cuda_ops.library import library
from workers.device.base import BYTES_PER_ELEMENT, Activation, Device, DtypeName, Group, Tensor
from workers.device.bfloat16 import HOST_TYPES, float32_from_bits, host_array

if TYPE_CHECKING:
    from cuda_ops import TiledWeight, Weight


_NAMES: dict[object, DtypeName] = {}  # of the frameworks' dtypes that were met: telling one takes its time


def dtype_of(tensor: Tensor) -> DtypeName:
    """The name of a tensor's dtype, whichever framework made it."""
    dtype = tensor.dtype
    if dtype not in _NAMES:
        _NAMES[dtype] = str(dtype).rpartition(".")[2]  # type: ignore[assignment]
    return _NAMES[dtype]


def bytes_of(tensor: Tensor) -> int:
    """Of a contiguous tensor. Raises ValueError for another."""
    if not tensor.is_contiguous():
        raise ValueError(f"cannot copy a tensor of shape {list(tensor.shape)} that is not contiguous")
    return prod(tensor.shape) * BYTES_PER_ELEMENT[dtype_of(tensor)]


@dataclass(frozen=True, slots=True)
class Arrived:
    """A download that was done at once; implements workers.device.base.Download."""

    array: np.ndarray

    def is_done(self) -> bool:
        return True

    def result(self) -> np.ndarray:
        return self.array


@dataclass(frozen=True, slots=True)
class RecordedCalls:
    """Calls of ops; implements workers.device.base.Graph."""

    make_again: Callable[[], None]

    def replay(self) -> None:
        self.make_again()


class PlainStore:
    """Memory that the system gives when it is first used; implements workers.device.base.HostStore."""

    def __init__(self, num_bytes: int) -> None:
        self._memory = np.empty(num_bytes, np.uint8)

    def save(self, tensor: Tensor, place: int) -> None:
        ctypes.memmove(self._address(place), tensor.data_ptr(), bytes_of(tensor))

    def load(self, tensor: Tensor, place: int) -> None:
        ctypes.memmove(tensor.data_ptr(), self._address(place), bytes_of(tensor))

    def _address(self, place: int) -> int:
        return int(self._memory.ctypes.data) + place


class HostDevice(Device):
    """All of workers.device.base.Device but what a framework has to do: make tensors, add, rearrange."""

    def __init__(self, rank: int = 0, world: int = 1, group: Group | None = None) -> None:
        """`group` joins the ranks; it may be None only when `world` is 1."""
        if group is None and world > 1:
            raise ValueError(f"{world} ranks need a group to meet in")
        self.name = "cpu"
        self.is_gpu = False
        self.can_record = False
        self.rank = rank
        self.world = world
        self.slowest_flops = 5e9
        self._group = group
        self._uploaded: dict[str | int, tuple[np.ndarray, Tensor]] = {}  # what is uploaded again: its memory
        self._downloaded: tuple[Tensor, np.ndarray] | None = None  # the last tensor, and its memory

    def enter_thread(self) -> None:
        pass

    # memory and copies --------------------------------------------------------------------------------

    def upload_all(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        return [self._upload_over(index, array, "int32") for index, array in enumerate(arrays)]

    def upload_again(self, name: str, array: np.ndarray) -> Tensor:
        return self._upload_over(name, array)

    def _upload_over(self, key: str | int, array: np.ndarray, dtype: DtypeName | None = None) -> Tensor:
        """Into the tensor that this key had last, which takes a tenth of the time of making one."""
        memory, tensor = self._uploaded.get(key, (None, None))
        if memory is not None and memory.shape == array.shape and memory.dtype == array.dtype:
            memory[...] = array
        else:
            tensor = self.upload(array, dtype)
            self._uploaded[key] = self.host_bits(tensor), tensor
        return tensor

    def write(self, tensor: Tensor, array: np.ndarray) -> None:
        if list(array.shape) != list(tensor.shape) or not tensor.is_contiguous():
            raise ValueError(f"cannot write {array.shape} into a tensor of shape {list(tensor.shape)}")
        bits = host_array(array, dtype_of(tensor))
        ctypes.memmove(tensor.data_ptr(), bits.ctypes.data, bits.nbytes)

    def write_corner(self, tensor: Tensor, array: np.ndarray) -> None:
        raise NotImplementedError("only recorded work, on a GPU, has tensors larger than its arrays")

    def download(self, tensor: Tensor) -> np.ndarray:
        bits = self.host_bits(tensor)
        return float32_from_bits(bits) if dtype_of(tensor) == "bfloat16" else bits.copy()

    def download_later(self, tensor: Tensor) -> Arrived:
        if self._downloaded is None or self._downloaded[0] is not tensor:
            self._downloaded = tensor, self.host_bits(tensor)
        bits = self._downloaded[1]
        return Arrived(float32_from_bits(bits) if bits.dtype == np.uint16 else bits.copy())

    def host_bits(self, tensor: Tensor) -> np.ndarray:
        dtype = np.dtype(HOST_TYPES[dtype_of(tensor)])
        if 0 in tensor.shape:
            return np.empty(tuple(tensor.shape), dtype)
        if not tensor.is_contiguous():
            raise ValueError(f"cannot look at a tensor of shape {list(tensor.shape)} that is not contiguous")
        memory = (ctypes.c_char * (prod(tensor.shape) * dtype.itemsize)).from_address(tensor.data_ptr())
        return np.frombuffer(memory, dtype).reshape(tuple(tensor.shape))

    def host_store(self, num_bytes: int) -> PlainStore:
        return PlainStore(num_bytes)

    def lend_scratch(self, num_bytes: int) -> None:
        pass  # the CPU's ops have memory of their own

    def free_memory(self) -> int:
        return min(_meminfo("MemAvailable"), _cgroup_limit())

    def total_memory(self) -> int:
        return min(_meminfo("MemTotal"), _cgroup_limit())

    # arithmetic ---------------------------------------------------------------------------------------

    def linear(
        self,
        x: Tensor,
        weight: Weight | TiledWeight,
        out: Tensor,
        bias: Tensor | None = None,
        activation: Activation = "none",
    ) -> None:
        cuda_ops.linear(x, weight, out, bias=bias, activation=activation)

    # recorded work ------------------------------------------------------------------------------------

    def capture(self, work: Callable[[], None]) -> RecordedCalls:
        return RecordedCalls(library.record(work))

    # collectives --------------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor) -> None:
        if self._group is not None:
            self._group.all_reduce(tensor)

    def all_reduce_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        self.all_reduce(x)
        cuda_ops.add_rms_norm(x, residual, weight, eps, out)

    def all_gather(self, tensor: Tensor, out: Tensor) -> None:
        if self._group is not None:
            self._group.all_gather(tensor, out)
        else:
            self.write(out[0], self.host_bits(tensor))

    def broadcast(self, tensor: Tensor, root: int) -> None:
        if self._group is not None:
            self._group.broadcast(tensor, root)

    def barrier(self) -> None:
        if self._group is not None:
            self._group.barrier()

    def synchronize(self) -> None:
        pass  # every call above returns when it is done

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


def _meminfo(field: str) -> int:
    """Bytes of one line of /proc/meminfo; physical memory where there is no such file."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _cgroup_limit() -> int:
    """Bytes that the container may use; effectively unbounded without one."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no cgroup v2 here, or "max"
        return 1 << 62

"""Memory that a rank keeps as long as it serves: weights and KV caches.

On a host it comes in huge pages where the system allows it (transparent_hugepage "madvise" or "always"):
gigabytes are then touched in thousands of steps and not in millions, and reading them needs fewer look-ups of
addresses. Never for what is allocated and freed again: a framework keeps such memory, this is given back.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from math import prod

import numpy as np

from workers.device.base import BYTES_PER_ELEMENT, Device, DtypeName, Tensor
from workers.device.bfloat16 import HOST_TYPES

_HUGE = 2 << 20  # bytes of a huge page on x86-64 and on arm64 with pages of 4 KiB
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)


def lasting(device: Device, shape: Sequence[int], dtype: DtypeName) -> Tensor:
    """A contiguous tensor with arbitrary content, as `device.empty` makes it."""
    num_bytes = prod(shape) * BYTES_PER_ELEMENT[dtype]
    if device.is_gpu or num_bytes < 2 * _HUGE or _ADVICE is None:
        return device.empty(shape, dtype)
    memory = mmap.mmap(-1, num_bytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(_ADVICE)
    start = -np.frombuffer(memory, np.uint8).ctypes.data % _HUGE  # the system's choice is a page of 4 KiB
    array: np.ndarray = np.frombuffer(memory, HOST_TYPES[dtype], prod(shape), start)
    return device.adopt(array.reshape(tuple(shape)), dtype)

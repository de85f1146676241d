"""Activation buffers that live from step to step.

Each name has one purpose and one buffer, as large as its largest use so far, so that a step of a size seen
before allocates nothing. Content is whatever was written last.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from workers.device.base import Device, DtypeName, Tensor


@dataclass(slots=True)
class _Buffer:
    memory: Tensor  # [capacity]
    shape: tuple[int, ...]  # of the last use
    view: Tensor


class Workspace:
    """Named scratch buffers of one rank."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, DtypeName], _Buffer] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: DtypeName) -> Tensor:
        """The buffer `name` seen with this shape; its content is arbitrary."""
        buffer = self._buffers.get((name, dtype))
        if buffer is not None and buffer.shape == shape:
            return buffer.view
        size = prod(shape)
        memory = buffer.memory if buffer is not None and buffer.memory.shape[0] >= size else None
        if memory is None:
            self._buffers.pop((name, dtype), None)  # free it before taking more
            memory = self._device.empty((size,), dtype)
        view = self._device.view(memory[:size], shape)
        self._buffers[name, dtype] = _Buffer(memory, shape, view)
        return view

    def clear(self) -> None:
        """Give all memory back."""
        self._buffers.clear()

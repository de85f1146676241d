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
    views: dict[tuple[int, ...], Tensor]  # by shape, of the last uses


_MOST_VIEWS = 8  # a name has few shapes in one step, and others in a step of another size


class Workspace:
    """Named scratch buffers of one rank."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, DtypeName], _Buffer] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: DtypeName) -> Tensor:
        """The buffer `name` seen with this shape; its content is arbitrary."""
        buffer = self._buffers.get((name, dtype))
        if buffer is not None and shape in buffer.views:
            return buffer.views[shape]
        size = prod(shape)
        if buffer is None or buffer.memory.shape[0] < size:
            buffer = None
            self._buffers.pop((name, dtype), None)  # free it before taking more
            buffer = self._buffers[name, dtype] = _Buffer(self._device.empty((size,), dtype), {})
        if len(buffer.views) == _MOST_VIEWS:
            buffer.views.clear()
        view = buffer.views[shape] = self._device.view(buffer.memory[:size], shape)
        return view

    def clear(self) -> None:
        """Give all memory back."""
        self._buffers.clear()

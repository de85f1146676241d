"""Calls of ops on the very objects they had last: recorded the second time, from then on made as one (CPU).

Behind a step that read all weights the caches hold nothing of the interpreter, and to hand a tensor to an op
costs more than a small op does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from workers.device.base import Device, Graph


class Recording:
    """Work that is recorded while what it is given stays the same."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._last: Sequence[object] = ()  # kept alive, so that nothing else gets its identities
        self._graph: Graph | None = None

    def is_for(self, given: Sequence[object]) -> bool:
        """Whether `run` makes recorded calls."""
        return self._graph is not None and self._is_last(given)

    def run(self, given: Sequence[object], work: Callable[[], None]) -> None:
        """Do `work`: calls of ops on `given` and on what stays as it is. On a GPU it is not recorded."""
        if self._device.is_gpu:
            work()
        elif not self._is_last(given):
            self._last, self._graph = given, None
            work()
        elif self._graph is None:
            self._graph = self._device.capture(work)
        else:
            self._graph.replay()

    def _is_last(self, given: Sequence[object]) -> bool:
        return list(map(id, given)) == list(map(id, self._last))

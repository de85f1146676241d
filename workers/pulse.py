"""A rank's sign of life: beats when the main loop advances, and for a promised while when it cannot.

The engine takes a rank that is silent for too long as dead. Some pieces of honest work are longer than
that: a large image's attention, or waiting in a collective for a rank that has more to do. For those the
main loop names how long it may take, and a thread beats until then. A stuck rank is silent after that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from engine.status_page import Heart
from workers.device.base import Group, Tensor

INTERVAL = 1.0  # seconds between beats of the thread


class Pulse:
    """Beats one rank's heart; `beat` from the main loop, `close` at the end."""

    def __init__(self, heart: Heart) -> None:
        self._heart = heart
        self._lock = threading.Lock()  # the row has one writer at a time
        self._promised_until = 0.0  # time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat_while_promised, name="pulse", daemon=True)
        self._thread.start()

    def beat(self, allowance: float = 0.0, **changes: int) -> None:
        """The main loop is alive and may be silent for `allowance` seconds; `changes` as in Heart.beat."""
        with self._lock:
            self._heart.beat(**changes)
            self._promised_until = time.monotonic() + allowance

    @contextmanager
    def waiting(self, timeout: float) -> Iterator[None]:
        """Beat for at most `timeout` seconds; the wait does not count against an earlier allowance."""
        remaining = max(self._promised_until - time.monotonic(), 0.0)
        self.beat(timeout)
        try:
            yield
        finally:
            self.beat(remaining)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _beat_while_promised(self) -> None:
        while not self._closing.wait(INTERVAL):
            with self._lock:
                if time.monotonic() < self._promised_until:
                    self._heart.beat()


class PatientGroup:
    """Collectives that beat while they wait; implements workers.device.base.Group.

    A rank that waits is well: the one it waits for must not make it look dead. The group's own timeout
    ends a wait that no rank's death explains.
    """

    def __init__(self, group: Group, pulse: Pulse, timeout: float) -> None:
        self._group, self._pulse, self._timeout = group, pulse, timeout

    def all_reduce(self, tensor: Tensor) -> None:
        with self._pulse.waiting(self._timeout):
            self._group.all_reduce(tensor)

    def all_gather(self, tensor: Tensor, out: Tensor) -> None:
        with self._pulse.waiting(self._timeout):
            self._group.all_gather(tensor, out)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        with self._pulse.waiting(self._timeout):
            self._group.broadcast(tensor, root)

    def barrier(self) -> None:
        with self._pulse.waiting(self._timeout):
            self._group.barrier()

    def close(self) -> None:
        self._group.close()

"""Reads a ZeroMQ socket on the event loop, without a thread and without polling.

A ZeroMQ descriptor signals only changes, so a reader takes everything that is there each time; whoever
also *sends* on the socket calls `drain_soon` afterwards, because sending may swallow the signal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import zmq

_PER_TURN = 256  # messages, then the event loop serves others first


class SocketReader:
    """Calls `on_message(frames)` for every message; `on_message` must not raise."""

    def __init__(self, socket: Any, on_message: Callable[[list[bytes]], None]) -> None:
        self._socket = socket
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._descriptor: int = socket.getsockopt(zmq.FD)
        self._is_open = True
        self._loop.add_reader(self._descriptor, self._drain)
        self.drain_soon()

    def drain_soon(self) -> None:
        """Look at the socket in the next turn of the event loop, never in the middle of the caller's work."""
        self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        for _ in range(_PER_TURN):
            if not self._is_open:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_message(frames)
        self.drain_soon()

    def close(self) -> None:
        """Stop reading; the socket stays open."""
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._descriptor)

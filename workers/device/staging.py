"""Pinned host memory through which arrays go to a GPU and come back, while the host goes on.

An upload is copied into one half of a pinned buffer and read from there by the GPU whenever it gets that far;
the halves take turns, so the host waits only when the GPU is a whole half behind. A download gets a
pinned block of its own until it is asked for. What is to stay on the host has a store, which is pinned as a
whole.
"""

from __future__ import annotations

import ctypes
import threading

import numpy as np

from workers.device.base import DtypeName, Tensor
from workers.device.bfloat16 import HOST_TYPES, float32_from_bits
from workers.device.driver import Driver
from workers.device.host import bytes_of

_HALF = 32 << 20  # bytes of one half of the upload buffer
_ALIGNMENT = 256
_SMALLEST = 4096  # bytes of a download's block
_KEPT = 1 << 20  # larger blocks are given back at once


class Uploads:
    """Copies arrays to the device in the order of the calls, from any thread."""

    def __init__(self, driver: Driver, stream: int, half: int = _HALF) -> None:
        self._driver, self._stream, self._half = driver, stream, half
        self._lock = threading.Lock()
        self._base = driver.allocate_pinned(2 * half)
        self._events = [driver.create_event(), driver.create_event()]  # the GPU has read this half
        self._turn = 0  # the half being filled
        self._used = 0  # bytes of it

    def send(self, array: np.ndarray, address: int) -> None:
        """Queue a copy of the contiguous array's bytes to `address`; the array may change at once."""
        with self._lock:
            for start in range(0, array.nbytes, self._half):
                size = min(array.nbytes - start, self._half)
                place = self._take(size)
                ctypes.memmove(place, array.ctypes.data + start, size)
                self._driver.copy_in(address + start, place, size, self._stream)

    def send_rows(self, array: np.ndarray, address: int, pitch: int) -> None:
        """As `send` of an array [n, m] to rows that lie `pitch` bytes apart; smaller than a half."""
        with self._lock:
            place = self._take(array.nbytes)
            ctypes.memmove(place, array.ctypes.data, array.nbytes)
            row_bytes = array.nbytes // len(array)
            self._driver.copy_in_rows(address, pitch, place, row_bytes, len(array), self._stream)

    def _take(self, size: int) -> int:
        """Room for `size` bytes; waits if the GPU still reads what is there."""
        if self._used + size > self._half:
            self._driver.record(self._events[self._turn], self._stream)
            self._turn, self._used = 1 - self._turn, 0
            self._driver.wait_for_event(self._events[self._turn])
        place = self._base + self._turn * self._half + self._used
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return place

    def close(self) -> None:
        for event in self._events:
            self._driver.destroy_event(event)
        self._driver.free_pinned(self._base)


class PinnedDownload:
    """An array on its way to the host; implements workers.device.base.Download."""

    def __init__(self, downloads: Downloads, block: _Block, shape: tuple[int, ...], dtype: DtypeName) -> None:
        self._downloads, self._block, self._shape, self._dtype = downloads, block, shape, dtype

    def is_done(self) -> bool:
        return self._downloads.driver.is_done(self._block.event)

    def bits(self) -> np.ndarray:
        """As `result`, but bf16 as uint16."""
        self._downloads.driver.wait_for_event(self._block.event)
        host = np.dtype(HOST_TYPES[self._dtype])
        array = np.empty(self._shape, host)
        ctypes.memmove(array.ctypes.data, self._block.address, array.nbytes)
        self._downloads.give_back(self._block)
        return array

    def result(self) -> np.ndarray:
        bits = self.bits()
        return float32_from_bits(bits) if self._dtype == "bfloat16" else bits


class _Block:
    """Pinned memory of one download, and the event that ends its copy."""

    def __init__(self, driver: Driver, size: int) -> None:
        self.size, self.address, self.event = size, driver.allocate_pinned(size), driver.create_event()


class Downloads:
    """Starts downloads; small blocks are used again."""

    def __init__(self, driver: Driver, stream: int) -> None:
        self.driver, self._stream = driver, stream
        self._free: dict[int, list[_Block]] = {}  # by size
        self._lock = threading.Lock()

    def start(self, address: int, shape: tuple[int, ...], dtype: DtypeName) -> PinnedDownload:
        num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(HOST_TYPES[dtype]).itemsize
        block = self._take(num_bytes)
        if num_bytes:
            self.driver.copy_out(block.address, address, num_bytes, self._stream)
        self.driver.record(block.event, self._stream)
        return PinnedDownload(self, block, shape, dtype)

    def give_back(self, block: _Block) -> None:
        if block.size > _KEPT:
            self._release(block)
            return
        with self._lock:
            self._free.setdefault(block.size, []).append(block)

    def close(self) -> None:
        for blocks in self._free.values():
            for block in blocks:
                self._release(block)
        self._free.clear()

    def _take(self, num_bytes: int) -> _Block:
        size = 1 << max(num_bytes - 1, _SMALLEST - 1).bit_length()  # a power of two, so that blocks fit again
        with self._lock:
            if blocks := self._free.get(size):
                return blocks.pop()
        return _Block(self.driver, size if size <= _KEPT else num_bytes)

    def _release(self, block: _Block) -> None:
        self.driver.destroy_event(block.event)
        self.driver.free_pinned(block.address)


class PinnedStore:
    """Implements workers.device.base.HostStore: copies wait on the stream, and nobody for them."""

    def __init__(self, driver: Driver, stream: int, num_bytes: int) -> None:
        self._driver, self._stream = driver, stream
        self._base = driver.allocate_pinned(num_bytes) if num_bytes else 0

    def save(self, tensor: Tensor, place: int) -> None:
        self._driver.copy_out(self._base + place, tensor.data_ptr(), bytes_of(tensor), self._stream)

    def load(self, tensor: Tensor, place: int) -> None:
        self._driver.copy_in(tensor.data_ptr(), self._base + place, bytes_of(tensor), self._stream)

    def close(self) -> None:
        if self._base:
            self._driver.free_pinned(self._base)
            self._base = 0

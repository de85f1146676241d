"""One safetensors file, mapped: its header, and slices of its tensors as raw bits.

A file is 8 bytes of header length, a JSON header, then the tensors' bytes; nothing is executed. Own code and
not the library's, because NumPy has no bf16 and the host's memory must stay bounded: a slice is copied
out and its pages are handed back to the page cache at once. Which tensors a model has is in
checkpoint_inventory.py.
"""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.errors import ConfigError

# bf16 is handled as its bits. Some exports declare bf16 as U16: the bits are the same.
_NUMPY_TYPES = {"BF16": np.uint16, "U16": np.uint16, "F32": np.float32}
_MAX_HEADER_BYTES = 100 << 20


class StoredTensor(NamedTuple):
    """Where a tensor lies: the type its file declares, its shape as stored, bytes from the start."""

    dtype: str  # "BF16", "U16" or "F32"
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.bytes_per_element

    @property
    def bytes_per_element(self) -> int:
        return np.dtype(_NUMPY_TYPES[self.dtype]).itemsize


class CheckpointFile:
    """A file opened for reading; `tensors` maps the names in it."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError when the file is no safetensors file, is cut short or has an unusable type."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._size = os.fstat(file.fileno()).st_size
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be opened: {error}; download it again") from None
        self.tensors = self._read_header()

    def read(self, name: str, rows: slice, columns: slice | None = None) -> np.ndarray:
        """A copy of `tensor[rows]` or `tensor[rows, columns]`: uint16 bits of bf16, or fp32."""
        tensor = self.tensors[name]
        kind = np.dtype(_NUMPY_TYPES[tensor.dtype])
        count = int(np.prod(tensor.shape))
        whole = np.frombuffer(self._map, kind, count, tensor.start).reshape(tensor.shape)
        part = whole[rows] if columns is None else whole[rows, columns]
        copy = np.array(part, order="C")
        del whole, part  # the map must not be referenced when its pages are dropped
        self._drop_pages(tensor)
        return copy

    def close(self) -> None:
        self._map.close()

    def _read_header(self) -> dict[str, StoredTensor]:
        length = int.from_bytes(self._map[:8], "little") if self._size >= 8 else -1
        if not 0 < length <= min(_MAX_HEADER_BYTES, self._size - 8):
            raise self._broken("it has no safetensors header")
        try:
            header = json.loads(self._map[8 : 8 + length])
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            return {name: self._read_entry(name, entry, 8 + length) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._broken(f"its header is malformed ({error})") from None

    def _read_entry(self, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
        dtype, shape = entry["dtype"], tuple(int(size) for size in entry["shape"])
        start, end = entry["data_offsets"]
        if dtype not in _NUMPY_TYPES:
            raise ConfigError(
                f"{self.path}: {name} is stored as {dtype}; Octet reads BF16 and F32, convert the checkpoint"
            )
        tensor = StoredTensor(dtype, shape, data_start + start)
        if start < 0 or end - start != tensor.num_bytes or data_start + end > self._size:
            raise self._broken(f"{name} does not fit in it")
        return tensor

    def _broken(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.path} is damaged: {reason}; download it again")

    def _drop_pages(self, tensor: StoredTensor) -> None:
        """Unmap what was read: the pages stay in the system's cache but leave this process."""
        first = tensor.start // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, first, tensor.start + tensor.num_bytes - first)

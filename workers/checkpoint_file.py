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

# bf16 is handled as its bits. Some exports declare bf16 as U16: the bits are the same. Bytes are what weights
# that are quantised already are kept in.
_NUMPY_TYPES = {"BF16": np.uint16, "U16": np.uint16, "F32": np.float32, "I8": np.int8, "U8": np.uint8}
_MAX_HEADER_BYTES = 100 << 20
_ROWS_AT_ONCE, _COLUMNS_AT_ONCE = 32, 512  # of a transpose; measured: 1.35 GB/s, 0.5 without blocks


class StoredTensor(NamedTuple):
    """Where a tensor lies: the type its file declares, its shape as stored, bytes from the start."""

    dtype: str  # "BF16", "U16", "F32", or "I8" or "U8" for quantised weights
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

    def will_read(self, name: str) -> None:
        """Start reading the tensor from the disk, without waiting for it."""
        self._advise(self.tensors[name], mmap.MADV_WILLNEED)

    def copy(self, name: str, rows: slice, columns: slice | None, out: np.ndarray) -> None:
        """out = tensor[rows] or tensor[rows, columns]; `out` has the stored type, see numpy_type."""
        whole = self._whole(name)
        out[...] = whole[rows] if columns is None else whole[rows, columns]
        self._drop_pages(self.tensors[name])

    def copy_transposed(self, name: str, rows: slice, columns: slice, out: np.ndarray) -> None:
        """out = tensor[rows, columns].T, a few stored rows at a time, so that they stay in the cache."""
        part = self._whole(name)[rows, columns]
        for start in range(0, len(part), _ROWS_AT_ONCE):
            stop = start + _ROWS_AT_ONCE
            for first in range(0, part.shape[1], _COLUMNS_AT_ONCE):
                last = first + _COLUMNS_AT_ONCE
                out[first:last, start:stop] = part[start:stop, first:last].T
        self._drop_pages(self.tensors[name])

    def numpy_type(self, name: str) -> np.dtype:
        """fp32, or uint16 for the bits of bf16."""
        return np.dtype(_NUMPY_TYPES[self.tensors[name].dtype])

    def _whole(self, name: str) -> np.ndarray:
        """The tensor as stored, in the mapped file."""
        tensor = self.tensors[name]
        count = int(np.prod(tensor.shape))
        return np.frombuffer(self._map, self.numpy_type(name), count, tensor.start).reshape(tensor.shape)

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
        self._advise(tensor, mmap.MADV_DONTNEED)

    def _advise(self, tensor: StoredTensor, advice: int) -> None:
        first = tensor.start // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(advice, first, tensor.start + tensor.num_bytes - first)

"""Final shards on disk, so that a second start maps files instead of reading, cutting and quantising again.

One file per rank, `<key>.weights`:

    magic, length of the header, checksum of the header
    header    JSON: what it is made from, the structure (weight_tree.py); type, shape, place, checksums
    tensors   as in memory, each at a multiple of ALIGNMENT

The key (weight_cache_key.py) names everything that decides the bytes. A file appears under its name only
when it is complete and on disk. Every tensor's checksums (XXH3) are compared at each start; what does not
match is removed and made anew. One process writes an entry, others go without. Entries used longest ago leave
when the size limit or the disk asks for it; a file that is mapped stays valid until its server ends.
`./run.sh cache` is weight_cache_command.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest as _checksum

from workers.device.base import BYTES_PER_ELEMENT, Device, DtypeName, Tensor
from workers.model.weights import ModelWeights
from workers.weight_tree import put_together, take_apart

SUFFIX = ".weights"
ALIGNMENT = 4096  # a page, so that tensors map as they are
DISK_RESERVE = 0.05  # of a disk that stays free

_MAGIC = b"OCTETWT2"
_FIXED = len(_MAGIC) + 8 + 8
_MAX_HEADER = 64 << 20
_CHUNK = 32 << 20  # bytes that have a checksum: the unit of progress
_NORESERVE = 0x4000  # MAP_NORESERVE: nobody writes to the mapping, so no memory has to stand behind it
_NUMPY_TYPES: dict[str, Any] = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "int8": np.int8,
    "uint8": np.uint8,
    "int32": np.int32,
    "int64": np.int64,
}

log = logging.getLogger(__name__)


class Damaged(Exception):
    """An entry that must not be served; the message says what is wrong with it."""


@dataclass(frozen=True)
class _Place:
    """One tensor in the file."""

    dtype: DtypeName
    shape: tuple[int, ...]
    offset: int
    checksums: tuple[int, ...]  # of its chunks

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * BYTES_PER_ELEMENT[self.dtype]


class WeightCache:
    """The entries of one folder."""

    def __init__(self, folder: Path, max_bytes: int = 0, num_threads: int = 1) -> None:
        """`max_bytes`: of all entries together; 0 leaves only the disk as the limit."""
        self.folder = folder
        self._max_bytes = max_bytes
        self._num_threads = num_threads

    def load(
        self, key: str, device: Device, on_progress: Callable[[int, int], None] = lambda loaded, total: None
    ) -> ModelWeights | None:
        """The entry's weights, mapped; None when there is none or it is damaged, which is logged and removed.

        `on_progress` gets bytes checked so far and in all.
        """
        path = self._path(key)
        try:
            weights = _map(path, key, device, self._num_threads, on_progress)
            os.utime(path)  # used now
        except FileNotFoundError:
            return None
        except (Damaged, OSError, ValueError) as error:
            log.warning("the weight cache's %s is damaged (%s) and is made again", path, error)
            path.unlink(missing_ok=True)
            return None
        log.info("weights mapped from %s", path)
        return weights

    def store_in_background(
        self, key: str, weights: ModelWeights, device: Device, about: dict[str, Any]
    ) -> threading.Thread:
        """Write the entry while the rank goes on; a failure is logged and harms nobody."""
        thread = threading.Thread(
            target=self.store, args=(key, weights, device, about), name="weight-cache", daemon=True
        )
        thread.start()
        return thread

    def store(self, key: str, weights: ModelWeights, device: Device, about: dict[str, Any]) -> bool:
        """Write the entry; False when it is not needed, another process is at it, or there is no room."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._only_writer(key) as is_ours:
                if not is_ours or self._path(key).exists():
                    return False
                self._write(key, weights, device, about)
                return True
        except OSError as error:
            log.warning("the weights are not kept in %s: %s", self.folder, error)
            return False

    def _write(self, key: str, weights: ModelWeights, device: Device, about: dict[str, Any]) -> None:
        structure, tensors = take_apart(weights)
        arrays = [device.host_bits(tensor) for tensor in tensors]
        self._make_room(sum(array.nbytes for array in arrays) + ALIGNMENT * len(arrays))
        partial = self._path(key).with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                _write_entry(file, key, structure, about, tensors, arrays)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self._path(key))
            _sync_folder(self.folder)
        finally:
            partial.unlink(missing_ok=True)
        log.info("weights kept in %s for the next start", self._path(key))

    def _make_room(self, needed: int) -> None:
        """Remove the entries used longest ago until `needed` bytes fit; OSError when they never will."""
        self._remove_abandoned()
        if self._max_bytes and needed > self._max_bytes:
            raise OSError(f"they take {needed >> 20} MiB, more than --weight-cache-size allows")
        entries = list_entries(self.folder)
        while not self._has_room(needed, sum(entry.num_bytes for entry in entries)):
            if not entries:
                raise OSError(
                    f"the disk has no room for {needed >> 20} MiB; free some, or choose another folder with "
                    "--weight-cache"
                )
            oldest = entries.pop(0)
            log.info("the weight cache forgets %s, used longest ago", oldest.path.name)
            oldest.path.unlink(missing_ok=True)

    def _remove_abandoned(self) -> None:
        """What writers left behind that were killed."""
        for partial in self.folder.glob("*.partial"):
            with self._only_writer(partial.stem) as is_abandoned:
                if is_abandoned:
                    partial.unlink(missing_ok=True)

    def _has_room(self, needed: int, held: int) -> bool:
        disk = shutil.disk_usage(self.folder)
        is_under_limit = not self._max_bytes or held + needed <= self._max_bytes
        return is_under_limit and disk.free - needed >= DISK_RESERVE * disk.total

    @contextlib.contextmanager
    def _only_writer(self, key: str) -> Iterator[bool]:
        """Whether this process may write the entry; the lock goes with the process."""
        with (self.folder / f"{key}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"


@dataclass(frozen=True)
class Entry:
    """One file of the cache, for people."""

    path: Path
    num_bytes: int
    used: float  # seconds since the epoch
    about: dict[str, Any]  # what was stored with it; empty when it cannot be read


def list_entries(folder: Path) -> list[Entry]:
    """All entries, those used longest ago first."""
    entries = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            entries.append(Entry(path, status.st_size, status.st_mtime, _about(path)))
    return sorted(entries, key=lambda entry: entry.used)


def _about(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return dict(_read_header(file.read(_FIXED), file)["about"])
    except (Damaged, OSError, ValueError, KeyError, TypeError):
        return {}


# the file -----------------------------------------------------------------------------------------


def _write_entry(
    file: Any,
    key: str,
    structure: Any,
    about: dict[str, Any],
    tensors: Sequence[Tensor],
    arrays: list[np.ndarray],
) -> None:
    """Tensors first, then the header into the room that was left for it."""
    places: list[dict[str, Any]] = []
    header: dict[str, Any] = {
        "key": key,
        "about": about,
        "structure": structure,
        "tensors": places,
        "data_start": 0,
    }
    offset = 0
    for tensor, array in zip(tensors, arrays, strict=True):
        dtype = str(tensor.dtype).rpartition(".")[2]
        place: dict[str, Any] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "offset": offset,
            "checksums": [0] * _num_chunks(array.nbytes),
        }
        places.append(place)
        offset += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    # What is still 0 becomes a number of at most 20 digits, so the header cannot grow beyond this.
    room = len(json.dumps(header)) + 20 * (1 + sum(len(place["checksums"]) for place in places))
    data_start = -(-(_FIXED + room) // ALIGNMENT) * ALIGNMENT
    header["data_start"] = data_start
    for place, array in zip(places, arrays, strict=True):
        file.seek(data_start + place["offset"])
        place["checksums"] = []
        for chunk in _chunks(array):
            place["checksums"].append(_checksum(chunk))
            file.write(chunk)
    file.truncate(data_start + offset)
    text = json.dumps(header).encode()
    assert _FIXED + len(text) <= data_start
    file.seek(0)
    file.write(_MAGIC + len(text).to_bytes(8, "little") + _checksum(text).to_bytes(8, "little") + text)


def _read_header(fixed: bytes, file: Any) -> dict[str, Any]:
    length = int.from_bytes(fixed[8:16], "little")
    if fixed[:8] != _MAGIC or length > _MAX_HEADER:
        raise Damaged("it is no file of this version")
    text = file.read(length)
    if _checksum(text) != int.from_bytes(fixed[16:24], "little"):
        raise Damaged("its header does not match its checksum")
    header = json.loads(text)
    assert isinstance(header, dict)
    return header


def _map(
    path: Path, key: str, device: Device, num_threads: int, on_progress: Callable[[int, int], None]
) -> ModelWeights:
    with path.open("rb") as file:
        header = _read_header(file.read(_FIXED), file)
        size = os.fstat(file.fileno()).st_size
        places = [
            _Place(t["dtype"], tuple(t["shape"]), header["data_start"] + t["offset"], tuple(t["checksums"]))
            for t in header["tensors"]
        ]
        if header["key"] != key or any(place.offset + place.num_bytes > size for place in places):
            raise Damaged("it is cut short or not what its name says")
        flags = mmap.MAP_PRIVATE | _NORESERVE
        memory = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    memory.madvise(mmap.MADV_WILLNEED)
    arrays = [
        np.frombuffer(memory, _NUMPY_TYPES[place.dtype], prod(place.shape), place.offset).reshape(place.shape)
        for place in places
    ]
    _check(arrays, places, num_threads, on_progress)
    tensors = [device.adopt(array, place.dtype) for array, place in zip(arrays, places, strict=True)]
    weights = put_together(header["structure"], tensors)
    assert isinstance(weights, ModelWeights)
    return weights


def _check(
    arrays: list[np.ndarray], places: list[_Place], num_threads: int, on_progress: Callable[[int, int], None]
) -> None:
    """Compare every chunk with its checksum, which also brings it into memory."""
    work = [
        (chunk, expected)
        for array, place in zip(arrays, places, strict=True)
        for chunk, expected in zip(_chunks(array), place.checksums, strict=True)
    ]
    total, checked = sum(len(chunk) for chunk, _ in work), 0
    with ThreadPoolExecutor(num_threads, "cache-check") as pool:
        for (chunk, expected), found in zip(
            work, pool.map(_checksum, (chunk for chunk, _ in work)), strict=True
        ):
            if found != expected:
                pool.shutdown(cancel_futures=True)
                raise Damaged("a tensor does not match its checksum")
            checked += len(chunk)
            on_progress(checked, total)


def _chunks(array: np.ndarray) -> Iterator[memoryview]:
    data = memoryview(array.reshape(-1).view(np.uint8).data)
    return (data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK))


def _num_chunks(num_bytes: int) -> int:
    return -(-num_bytes // _CHUNK)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

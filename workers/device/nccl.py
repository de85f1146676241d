"""NCCL, which a CUDA build of either framework brings along: collectives between GPUs on a rank's stream.

Called directly, so that both frameworks share it, no rank opens a port, and recorded graphs may contain it.
Its sums have an order of NCCL's choosing; gpu_group.py uses it for sums only where ranks cannot map each
other's memory. Tests put a library of their own in its place.
"""

from __future__ import annotations

import contextlib
import ctypes
from ctypes import byref, c_int, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import ConfigError, EngineError
from workers.device.base import DtypeName

ID_BYTES = 128
_SUM = 0
_TYPES: dict[DtypeName, int] = {
    "int8": 0,
    "uint8": 1,
    "int32": 2,
    "int64": 4,
    "float32": 7,
    "bfloat16": 9,
}  # ncclDataType_t


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * ID_BYTES)]


class Nccl:
    """One rank's communicator. Every rank makes the same calls in the same order."""

    def __init__(self, library: Any | None = None) -> None:
        self._nccl = library or _load()
        self._nccl.ncclGetErrorString.restype = ctypes.c_char_p
        self._communicator = c_void_p()

    def new_id(self) -> np.ndarray:
        """What all ranks need to find each other, made by one of them; [ID_BYTES] uint8."""
        unique = _UniqueId()
        self._call("ncclGetUniqueId", byref(unique))
        return np.frombuffer(bytes(unique), np.uint8).copy()

    def join(self, unique: np.ndarray, rank: int, world: int) -> None:
        """Returns when all ranks have come."""
        identity = _UniqueId.from_buffer_copy(unique.tobytes())
        self._call("ncclCommInitRank", byref(self._communicator), c_int(world), identity, c_int(rank))

    def all_reduce(self, address: int, count: int, dtype: DtypeName, stream: int) -> None:
        self._call(
            "ncclAllReduce",
            c_void_p(address),
            c_void_p(address),
            c_size_t(count),
            c_int(_TYPES[dtype]),
            c_int(_SUM),
            self._communicator,
            c_void_p(stream),
        )

    def all_gather(self, address: int, out: int, count: int, dtype: DtypeName, stream: int) -> None:
        """`count` elements of each rank, in rank order, into `out`."""
        self._call(
            "ncclAllGather",
            c_void_p(address),
            c_void_p(out),
            c_size_t(count),
            c_int(_TYPES[dtype]),
            self._communicator,
            c_void_p(stream),
        )

    def broadcast(self, address: int, count: int, dtype: DtypeName, root: int, stream: int) -> None:
        self._call(
            "ncclBroadcast",
            c_void_p(address),
            c_void_p(address),
            c_size_t(count),
            c_int(_TYPES[dtype]),
            c_int(root),
            self._communicator,
            c_void_p(stream),
        )

    def close(self) -> None:
        """Leave at once, also when other ranks are gone."""
        if self._communicator.value:
            self._nccl.ncclCommAbort(self._communicator)
            self._communicator = c_void_p()

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._nccl, name)(*arguments):
            words = self._nccl.ncclGetErrorString(c_int(code)) or b"unknown"
            raise EngineError(f"{name} failed between the GPUs: {words.decode()} (NCCL error {code})")


def _load() -> ctypes.CDLL:
    for path in ("libnccl.so.2", *_installed()):  # by name first: the one that the framework has loaded
        with contextlib.suppress(OSError):
            return ctypes.CDLL(path)
    raise ConfigError(
        "--tensor-parallel-size above 1 on GPUs needs NCCL (libnccl.so.2), which comes with the CUDA builds "
        "of PaddlePaddle and PyTorch; reinstall the framework"
    )


def _installed() -> list[str]:
    """Where the frameworks' wheels put it."""
    spec = find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return [str(Path(folder) / "nccl" / "lib" / "libnccl.so.2") for folder in folders]

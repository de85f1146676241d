"""Runs the CUDA bodies without a GPU: builds csrc/gpu with the host compiler and calls its launchers.

The same `.cu` files that nvcc compiles are compiled by g++ against csrc/emulate, where CUDA threads are
fibers (csrc/emulate/block.hpp). Buffers are NumPy arrays. What the emulator finds wrong with a kernel
(a race, a divergent barrier, an access outside of the arrays it was given) is raised as EmulatorError with
the kernel, block and thread. The suite uses it; nothing in the server does.

Variables: OCTET_EMULATOR_SANITIZE=address builds with AddressSanitizer instead of the emulator's own hooks
(start Python with LD_PRELOAD of libasan.so then); OCTET_EMULATOR_THREADS is how many OS threads run blocks.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .build import (
    NUM_JOBS,
    BuildError,
    cache_folder,
    find_compiler,
    include_flags,
    link_flags,
    locked,
)
from .ffi import import_tvm_ffi
from .includes import files_behind

SOURCE = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra")
EXPORTS = SOURCE / "emulate" / "exports.cpp"  # names the launchers of csrc/gpu
RUNTIME = SOURCE / "emulate" / "runtime.cpp"  # for csrc/gpu_boundary
INCLUDES = (SOURCE / "emulate", SOURCE / "gpu")
# Kernels go through hooks that see every access (csrc/emulate/hooks.cpp); the emulator itself does not.
# Without -fno-tree-sra a 16-byte access would be seen as four of 4 bytes, which the device never does.
HOOKS = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-Wno-tsan", "-fno-tree-sra")
ADDRESS = ("-fsanitize=address", "-fno-omit-frame-pointer")


class EmulatorError(RuntimeError):
    """A kernel did something that a GPU would not forgive, or that a launcher refuses."""


@dataclass(frozen=True)
class Cost:
    """What the accesses of one source line cost a kernel's warps."""

    kernel: str
    place: str  # file:line
    memory: str  # "shared": wavefronts; "global": sectors of 32 bytes
    requests: int  # warp accesses
    cost: int
    least: int  # that the same bytes could cost


class Emulator:
    """The launchers of one emulated library, called by name with NumPy arrays."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.octet_emulator_report.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        """Call octet::gpu::<name>; raises EmulatorError with what went wrong.

        Arguments in the launcher's order: arrays (C-contiguous; read or written in place, and all that the
        kernel may touch), None for a null pointer, int for any integer or enum, float for fp32, bool,
        a ctypes structure passed by reference together with the arrays it points to: `(structure, arrays)`.
        """
        launcher = self._launcher(name)
        self._library.octet_emulator_forget()
        values = [self._value(argument) for argument in arguments]
        wrong = launcher(*values)
        if wrong is not None:
            report = self._library.octet_emulator_report().decode()
            raise EmulatorError(f"{name}: {wrong.decode()}" + (f": {report}" if report else ""))

    @contextmanager
    def profile(self) -> Iterator[list[Cost]]:
        """Count what the calls inside cost; the list is filled, most wasteful first, when the block ends."""
        costs: list[Cost] = []
        self._library.octet_emulator_profile(True)
        try:
            yield costs
        finally:
            self._library.octet_emulator_profile(False)
        costs += self._costs()

    def _costs(self) -> list[Cost]:
        self._library.octet_emulator_costs.restype = ctypes.c_char_p
        total: dict[tuple[str, int, str], list[int]] = {}
        for line in self._library.octet_emulator_costs().decode().splitlines():
            kernel, offset, memory, *numbers = line.split()
            entry = total.setdefault((kernel, int(offset), memory), [0, 0, 0])
            entry[:] = [a + int(b) for a, b in zip(entry, numbers, strict=True)]
        places = self._places(sorted({offset for _, offset, _ in total}))
        costs = [Cost(k, places[offset], memory, *numbers) for (k, offset, memory), numbers in total.items()]
        return sorted(costs, key=lambda cost: cost.least - cost.cost)

    def _places(self, offsets: list[int]) -> dict[int, str]:
        """file:line of each instruction, as the compiler's line table has it."""
        # An address noted is the one after the call, so look just before it.
        asked = "\n".join(hex(offset - 1) for offset in offsets)
        command = ["addr2line", "-e", self._library._name]
        answer = subprocess.run(command, input=asked, capture_output=True, text=True, check=True).stdout
        names = [line.rpartition("/")[2].split(" ")[0] for line in answer.splitlines()]
        return dict(zip(offsets, names, strict=True))

    def number(self, name: str, *arguments: int) -> int:
        """What octet::gpu::<name>, a function of integers that launches nothing, returns."""
        return int(self._launcher(name, ctypes.c_int64)(*map(ctypes.c_int64, arguments)))

    def _launcher(self, name: str, result: Any = ctypes.c_char_p) -> Any:
        address = ctypes.c_void_p.in_dll(self._library, f"octet_gpu_{name}").value
        assert address is not None
        return ctypes.CFUNCTYPE(result)(address)

    def _value(self, argument: Any) -> Any:
        if argument is None:
            return ctypes.c_void_p(None)
        if isinstance(argument, np.ndarray):
            assert argument.flags.c_contiguous, "an array must be contiguous"
            return self._register(argument)
        if isinstance(argument, tuple):
            structure, arrays = argument
            for array in arrays:
                self._register(array)
            return ctypes.byref(structure)
        if isinstance(argument, bool):
            return ctypes.c_bool(argument)
        if isinstance(argument, int | np.integer):
            return ctypes.c_int64(int(argument))
        return ctypes.c_float(argument)

    def _register(self, array: np.ndarray) -> ctypes.c_void_p:
        """Allow kernels to touch the array's bytes; returns its address."""
        pointer = ctypes.c_void_p(array.ctypes.data)
        self._library.octet_emulator_register(pointer, ctypes.c_size_t(array.nbytes))
        return pointer


@cache
def emulator() -> Emulator:
    """All launchers of csrc/gpu, compiled on first use and kept in the cache."""
    import_tvm_ffi()  # the library's boundary needs it
    return Emulator(emulated_library_path())


def emulated_library_path() -> Path:
    """The emulated twin of build_gpu.gpu_library_path(): launchers under C names, and the boundary."""
    kernels = sorted(path for path in (SOURCE / "gpu").glob("*.cu") if path.name != "runtime.cu")
    boundary = sorted((SOURCE / "gpu_boundary").glob("*.cc"))
    return library_path([EXPORTS, RUNTIME, *kernels, *boundary], "cuda_ops", link_flags())


def library_path(sources: Sequence[Path], name: str, link: Sequence[str] = ()) -> Path:
    """A library of the emulator and these files. Raises BuildError with the compiler's words."""
    compiler, base = find_compiler(), cache_folder().parent / "emulator"
    objects = {source: base / f"{source.stem}-{_key(source)}.o" for source in (*_own_sources(), *sources)}
    key = hashlib.sha256(" ".join(map(str, objects.values())).encode()).hexdigest()[:20]
    library = base / f"{name}-{key}.so"
    if library.exists():
        return library
    with locked(base / "build.lock"), ThreadPoolExecutor(NUM_JOBS) as pool:
        missing = {source: made for source, made in objects.items() if not made.exists()}
        list(pool.map(lambda item: _compile(compiler, *item), missing.items()))
        shared = "-fsanitize=address" if _sanitizer() == "address" else ""
        _run(
            [compiler, "-shared", *filter(None, [shared]), *map(str, objects.values()), *link, "-lpthread"],
            library,
        )
    return library


def address_sanitizer_runtime() -> Path | None:
    """What LD_PRELOAD must name to load an AddressSanitizer build into Python; None if not installed."""
    found = subprocess.run([find_compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    path = Path(found.stdout.strip())
    return path.resolve() if path.is_absolute() and path.exists() else None


def _own_sources() -> list[Path]:
    return sorted(path for path in (SOURCE / "emulate").glob("*.cpp") if path not in (EXPORTS, RUNTIME))


def _sanitizer() -> str:
    return os.environ.get("OCTET_EMULATOR_SANITIZE") or "hooks"


def _flags(source: Path) -> tuple[str, ...]:
    if source.parent.name == "gpu_boundary":
        return (*FLAGS, *include_flags())  # host code, the same as beside nvcc's kernels
    include = tuple(f"-I{folder}" for folder in INCLUDES)
    if _sanitizer() == "address":
        return (*FLAGS, *include, *ADDRESS)
    hooks = HOOKS if source.suffix == ".cu" else ("-O2",)
    return (*FLAGS, *include, "-DOCTET_EMULATE_HOOKS", *hooks)


def _key(source: Path) -> str:
    """Hash of a source, what it includes, and its flags."""
    digest = hashlib.sha256(" ".join(_flags(source)).encode())
    for path in files_behind(source, INCLUDES):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _compile(compiler: str, source: Path, made: Path) -> None:
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    ignored = ["-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]
    _run([compiler, *_flags(source), *ignored, *language, "-c", str(source)], made)


def _run(command: Sequence[str], made: Path) -> None:
    """Run a compiler that writes `made`, which appears whole or not at all."""
    made.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=made.parent, suffix=made.suffix)
    os.close(handle)
    try:
        finished = subprocess.run([*command, "-o", temporary], capture_output=True, text=True)
        if finished.returncode != 0:
            raise BuildError(
                "Compiling the emulator failed; the command was\n"
                f"  {' '.join(command)}\n{finished.stderr.strip()}"
            )
        shutil.move(temporary, made)
    finally:
        Path(temporary).unlink(missing_ok=True)

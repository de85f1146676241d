"""Compiles the C++ under csrc/ into one shared library, once per machine.

`library_path()` is what library.py loads: it builds only when the cache has no library for exactly these
sources, flags and compiler. `python -m cuda_ops.build` does the same with progress lines, for run.sh.

The cache is `$OCTET_CACHE/ops` (default `~/.cache/octet/ops`). Each library sits in a folder named by the
hash of what it was made from; it is built beside and renamed into place, under a file lock, so ranks that
start together build once and a killed build leaves nothing half written. Object files are kept the same
way, each named by what it was made from (includes.py): a changed file recompiles only what includes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from cuda_ops.ffi import import_tvm_ffi
from cuda_ops.includes import files_behind

SOURCE = Path(__file__).parent / "csrc"
HEADERS = ("include", "common", "cpu")  # folders of csrc/
SOURCES = ("common", "cpu", "boundary")
NUM_JOBS = 2  # compilers at once; each takes about 400 MB
COMMON_FLAGS = ("-std=c++20", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall")
# -ffp-contract=off: which sums are fused is written in the source, never left to the optimiser, because two
# inlined copies of one expression must give the same bits.

AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
AVX2 = ("avx2", "fma", "f16c")
# Used when present; spelled as in /proc/cpuinfo.
EXTRA = {"avx512": ("avx512_vnni", "avx512_bf16"), "avx2": ("avx_vnni",), "generic": ()}

Progress = Callable[[str], None]


class BuildError(RuntimeError):
    """The library could not be compiled; the message is one sentence, then the compiler's words."""


@dataclass(frozen=True)
class Target:
    """An instruction set level and the compiler flags that select it."""

    isa: str  # "avx512", "avx2" or "generic"
    flags: tuple[str, ...]


def library_path(isa: str | None = None, progress: Progress | None = None) -> Path:
    """The shared library for this machine, built first if it is not in the cache.

    isa       "avx512", "avx2" or "generic"; None: $OCTET_OPS_ISA or the best this CPU has
    progress  called with one line per step of a build; never called on a cache hit
    Raises BuildError.
    """
    target = choose_target(isa or os.environ.get("OCTET_OPS_ISA") or None, cpu_flags())
    compiler = find_compiler()
    library = cache_folder() / f"{target.isa}-{build_key(target, compiler)}" / "libcuda_ops.so"
    if library.exists():
        return library
    with locked(cache_folder() / "build.lock"):
        if not library.exists():  # another rank may have built it while this one waited
            _build(target, compiler, library, progress or (lambda line: None))
    return library


def cache_folder() -> Path:
    base = os.environ.get("OCTET_CACHE")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "octet")
    return Path(base) / "ops"


def cpu_flags() -> frozenset[str]:
    """Feature words of the first CPU in /proc/cpuinfo; empty where the system has no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith("flags"))
    return frozenset(next(lines, ":").split(":", 1)[1].split())


def choose_target(isa: str | None, available: frozenset[str]) -> Target:
    """The wanted level, or the best one whose features are all `available`."""
    levels = {"avx512": AVX512 + AVX2, "avx2": AVX2, "generic": ()}
    if isa is None:
        isa = next(name for name, needs in levels.items() if available.issuperset(needs))
    if isa not in levels:
        raise BuildError(f"OCTET_OPS_ISA is {isa!r}; it must be one of {', '.join(levels)}.")
    missing = sorted(set(levels[isa]) - available)
    if missing:
        raise BuildError(f"OCTET_OPS_ISA is {isa!r} but this CPU lacks {', '.join(missing)}.")
    extra = tuple(flag for flag in EXTRA[isa] if flag in available)
    return Target(isa, tuple("-m" + flag.replace("_", "") for flag in levels[isa] + extra))


def find_compiler() -> str:
    compiler = os.environ.get("CXX") or "g++"
    path = shutil.which(compiler)
    if path is None:
        raise BuildError(f"The C++ compiler {compiler!r} was not found: install g++ 11 or newer, or set CXX.")
    return path


def build_key(target: Target, compiler: str) -> str:
    """Hash of everything the library is made from."""
    digest = hashlib.sha256()
    for part in (*COMMON_FLAGS, *target.flags, *_linked_against(), _compiler_version(compiler)):
        digest.update(part.encode() + b"\0")
    for path in _files(HEADERS, "*.h") + _files(SOURCES, "*.cc"):
        digest.update(str(path.relative_to(SOURCE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _files(folders: tuple[str, ...], pattern: str) -> list[Path]:
    return sorted(path for folder in folders for path in (SOURCE / folder).glob(pattern))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the system frees it if this process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(target: Target, compiler: str, library: Path, progress: Progress) -> None:
    folder = library.parent
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        objects = _compile_all(target, compiler, work, progress)
        _run([compiler, "-shared", *map(str, objects), *link_flags(), "-o", str(work / library.name)])
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compile_all(target: Target, compiler: str, work: Path, progress: Progress) -> list[Path]:
    sources = sorted(_files(SOURCES, "*.cc"), key=lambda path: -path.stat().st_size)  # longest first
    objects = {source: _object_path(source, target, compiler) for source in sources}
    missing = [source for source in sources if not objects[source].exists()]
    progress(f"building cuda_ops for {target.isa}: {len(missing)} of {len(sources)} files to compile")
    started, done = time.monotonic(), 0

    def compile_one(source: Path) -> None:
        nonlocal done
        out = work / objects[source].name
        _run([compiler, *_compile_flags(source, target), "-c", str(source), "-o", str(out)])
        out.rename(objects[source])
        done += 1
        seconds = time.monotonic() - started
        progress(f"[{done}/{len(missing)}] {source.relative_to(SOURCE)}  {seconds:.1f} s")

    objects[sources[0]].parent.mkdir(exist_ok=True)
    with ThreadPoolExecutor(NUM_JOBS) as pool:
        list(pool.map(compile_one, missing))
    return list(objects.values())


def _object_path(source: Path, target: Target, compiler: str) -> Path:
    digest = hashlib.sha256()
    for part in (*_compile_flags(source, target), *_linked_against(), _compiler_version(compiler)):
        digest.update(part.encode() + b"\0")
    for path in files_behind(source):
        digest.update(str(path.relative_to(SOURCE.resolve())).encode() + b"\0" + path.read_bytes() + b"\0")
    return cache_folder() / "objects" / f"{source.stem}-{digest.hexdigest()[:20]}.o"


def _compile_flags(source: Path, target: Target) -> list[str]:
    is_boundary = source.parent.name == "boundary"  # checks and calls: nothing there is worth -O3
    return [*COMMON_FLAGS, *(["-O1"] if is_boundary else ["-O3", *target.flags]), *include_flags()]


def _run(command: list[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        raise BuildError(
            f"Compiling cuda_ops failed; the command was\n  {' '.join(command)}\n{finished.stderr.strip()}"
        )


@cache
def _compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _linked_against() -> tuple[str, ...]:
    return ("apache-tvm-ffi", version("apache-tvm-ffi"))


def include_flags() -> list[str]:
    """What a boundary file needs to compile."""
    libinfo = import_tvm_ffi().libinfo
    return [f"-isystem{path}" for path in (libinfo.find_include_path(), libinfo.find_dlpack_include_path())]


def link_flags() -> list[str]:
    """What a library with a boundary links to."""
    libinfo = import_tvm_ffi().libinfo
    library = Path(libinfo.find_libtvm_ffi())
    return [f"-L{library.parent}", f"-l:{library.name}", "-lpthread"]


def main() -> int:
    started = time.monotonic()
    try:
        path = library_path(progress=lambda line: print(line, flush=True))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"cuda_ops ready in {time.monotonic() - started:.1f} s: {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compiles the CUDA bodies with nvcc into one shared library, once per machine.

`gpu_library_path()` is what device_library.py loads when a tensor on a GPU is met; `python -m
cuda_ops.build_gpu` does the same beforehand with progress lines. Kernels (csrc/gpu/*.cu) are compiled by
nvcc for sm_80 and sm_90 and as PTX for what comes after; the boundary (csrc/gpu_boundary/*.cc) by the host
compiler, because it includes no CUDA header. The cache is `$OCTET_CACHE/gpu`, kept as build.py keeps its own.

Variables: CUDA_HOME or OCTET_NVCC name the toolkit or its compiler; OCTET_GPU_ARCHS, as in "90", builds for
fewer GPUs, sooner.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_ops.build import (
    SOURCE,
    BuildError,
    Progress,
    cache_folder,
    find_compiler,
    include_flags,
    link_flags,
    locked,
)
from cuda_ops.includes import files_behind

ARCHITECTURES = ("80", "90")
FLAGS = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden")
HOST_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall")


def find_nvcc() -> str:
    """Path of nvcc. Raises BuildError with what to install or set."""
    asked = os.environ.get("OCTET_NVCC")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [asked] if asked else [home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next((path for place in places if place and (path := shutil.which(place))), None)
    if found is None:
        raise BuildError(
            f"The CUDA compiler {asked or 'nvcc'!r} was not found: install the CUDA toolkit (12.4 or newer), "
            "or name it with CUDA_HOME or OCTET_NVCC."
        )
    return found


def architectures() -> tuple[str, ...]:
    """The compute capabilities to build for, as in ("80", "90"). Raises BuildError for one below 80."""
    asked = tuple(os.environ.get("OCTET_GPU_ARCHS", "").replace(",", " ").split()) or ARCHITECTURES
    for one in asked:
        if not one.isdigit() or int(one) < 80:
            raise BuildError(f"OCTET_GPU_ARCHS names {one!r}; it must be 80 (A100) or newer, as in '80 90'.")
    return asked


def code_flags(asked: tuple[str, ...]) -> list[str]:
    """nvcc's words for these: machine code for each, and PTX of the last for GPUs to come."""
    machine = [f"-gencode=arch=compute_{one},code=sm_{one}" for one in asked]
    return [*machine, f"-gencode=arch=compute_{asked[-1]},code=compute_{asked[-1]}"]


def gpu_library_path(progress: Progress | None = None) -> Path:
    """The library for this toolkit, built first if it is not in the cache. Raises BuildError."""
    nvcc, compiler, base = find_nvcc(), find_compiler(), cache_folder().parent / "gpu"
    flags = [*FLAGS, *code_flags(architectures())]
    key = _Key(nvcc, compiler, flags)
    library = base / key.of(*_sources()) / "libcuda_ops_gpu.so"
    if library.exists():
        return library
    with locked(base / "build.lock"):
        if not library.exists():  # another rank may have built it while this one waited
            _build(nvcc, compiler, flags, key, library, progress or (lambda line: None))
    return library


class _Key:
    """Hashes of what an object file or the library is made from."""

    def __init__(self, nvcc: str, compiler: str, flags: list[str]) -> None:
        self._common = hashlib.sha256(" ".join([nvcc, compiler, *flags, *HOST_FLAGS]).encode())
        for command in (nvcc, compiler):
            words = subprocess.run([command, "--version"], capture_output=True, check=False).stdout
            self._common.update(words)

    def of(self, *sources: Path) -> str:
        digest = self._common.copy()
        for source in sources:
            for path in files_behind(source, [SOURCE / "gpu"]):
                digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()[:20]


def _sources() -> list[Path]:
    kernels = sorted((SOURCE / "gpu").glob("*.cu"), key=lambda path: -path.stat().st_size)  # longest first
    return kernels + sorted((SOURCE / "gpu_boundary").glob("*.cc"))


def _build(nvcc: str, compiler: str, flags: list[str], key: _Key, library: Path, progress: Progress) -> None:
    base, started, done = library.parent.parent, time.monotonic(), 0
    objects = {source: base / "objects" / f"{source.stem}-{key.of(source)}.o" for source in _sources()}
    missing = [source for source, made in objects.items() if not made.exists()]
    progress(f"building the CUDA bodies: {len(missing)} of {len(objects)} files to compile")
    (base / "objects").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base) as work:

        def compile_one(source: Path) -> None:
            nonlocal done
            out = Path(work, objects[source].name)
            if source.suffix == ".cu":
                command = [nvcc, *flags, f"-I{SOURCE / 'gpu'}", f"-ccbin={compiler}"]
            else:
                command = [compiler, *HOST_FLAGS, *include_flags()]
            _run([*command, "-c", str(source), "-o", str(out)])
            out.rename(objects[source])
            done += 1
            progress(f"[{done}/{len(missing)}] {source.name}  {time.monotonic() - started:.1f} s")

        with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
            list(pool.map(compile_one, missing))
        linked = Path(work, library.name)
        # nvcc knows where its runtime is, and links it in, so that no other version can take its place.
        runtime = ["-shared", "-cudart=static", f"-ccbin={compiler}"]
        _run([nvcc, *runtime, *map(str, objects.values()), *link_flags(), "-o", str(linked)])
        library.parent.mkdir(exist_ok=True)
        linked.rename(library)


def _run(command: list[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        raise BuildError(
            "Compiling the CUDA bodies failed; the command was\n"
            f"  {' '.join(command)}\n{finished.stderr.strip()}"
        )


def main() -> int:
    started = time.monotonic()
    try:
        path = gpu_library_path(progress=lambda line: print(line, flush=True))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"CUDA bodies ready in {time.monotonic() - started:.1f} s: {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

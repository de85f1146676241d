"""nvcc takes every kernel for sm_80 and sm_90, and no hot kernel keeps registers in memory."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cuda_ops import build_gpu
from cuda_ops.build import BuildError, cache_folder
from cuda_ops.emulator import SOURCE

# The largest first, so that two at a time end together.
SOURCES = sorted((SOURCE / "gpu").glob("*.cu"), key=lambda path: -path.stat().st_size)
HEADERS = [
    path
    for path in sorted(SOURCE.rglob("*"))
    if path.suffix in (".h", ".cuh") and "emulate" not in path.parts
]
ARCHITECTURES = ("80", "90")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def compile_for_gpus(nvcc: str, source: Path) -> str:
    """What nvcc says; the register use of each kernel is part of it. Kept until something it read changes."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    flags = ["-std=c++20", "-fatbin", *targets, "-Xptxas", "-v"]  # device code alone: half the time
    digest = hashlib.sha256(" ".join([nvcc, *flags]).encode())
    for path in (source, *HEADERS):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    kept = cache_folder().parent / "nvcc" / f"{source.stem}-{digest.hexdigest()[:20]}.txt"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as work:
            made = f"{work}/{source.stem}.fatbin"
            command = ["nice", "-n", "10", nvcc, *flags, f"-I{SOURCE / 'gpu'}", str(source), "-o", made]
            finished = subprocess.run(command, capture_output=True, text=True)
            assert finished.returncode == 0, f"{source.name}\n{finished.stderr}"
            report = Path(work, "report.txt")
            report.write_text(finished.stderr)
            report.rename(kept)
    return kept.read_text()


def spilling_kernels(report: str) -> list[str]:
    """Kernels of a ptxas report that store or load spilled registers."""
    found, entry = [], "?"
    for line in report.splitlines():
        if named := ENTRY.search(line):
            entry = f"{named[1]} ({named[2]})"
        elif (spills := SPILLS.search(line)) and spills.groups() != ("0", "0"):
            found.append(f"{entry}: {spills[0]}")
    return found


def test_a_spill_in_a_report_is_found() -> None:
    report = (
        "ptxas info    : Compiling entry function 'hot' for 'sm_80'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
    )
    assert spilling_kernels(report) == ["hot (sm_80): 4 bytes spill stores, 12 bytes spill loads"]


def test_every_kernel_compiles_without_spills() -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed; the kernels are compiled for the GPU where it is")
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda source: compile_for_gpus(nvcc, source), SOURCES))
    entries = [entry for report in reports for entry in ENTRY.findall(report)]
    assert len(entries) > 20 * len(ARCHITECTURES), f"only {len(entries)} kernels were compiled"
    spills = [line for report in reports for line in spilling_kernels(report)]
    assert not spills, "\n".join(spills)


def test_a_machine_without_a_driver_is_told_so_in_one_sentence(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has a driver")
    probe = tmp_path / "probe.cu"
    probe.write_text(
        f'#include "{SOURCE}/gpu/runtime.cu"\n'
        'extern "C" const char* use_device(long index) { return octet::gpu::use_device(index); }\n'
    )
    library = tmp_path / "probe.so"
    command = [
        nvcc,
        "-std=c++20",
        "-arch=sm_80",
        "-shared",
        "-Xcompiler=-fPIC",
        str(probe),
        "-o",
        str(library),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    use_device = ctypes.CDLL(str(library)).use_device
    use_device.restype = ctypes.c_char_p
    assert b"driver is missing or older than the CUDA toolkit" in use_device(0)


def test_a_missing_toolkit_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTET_NVCC", "no-such-nvcc")
    with pytest.raises(BuildError, match="'no-such-nvcc' was not found: install the CUDA toolkit"):
        build_gpu.find_nvcc()


def test_gpus_older_than_the_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTET_GPU_ARCHS", "80 75")
    with pytest.raises(BuildError, match="OCTET_GPU_ARCHS names '75'; it must be 80"):
        build_gpu.architectures()
    monkeypatch.setenv("OCTET_GPU_ARCHS", "90,100")
    assert build_gpu.code_flags(build_gpu.architectures()) == [
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]

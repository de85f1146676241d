"""nvcc takes every kernel for sm_80 and sm_90, and no hot kernel keeps registers in memory."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cuda_ops.build import cache_folder
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

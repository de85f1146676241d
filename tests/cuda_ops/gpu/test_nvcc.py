"""nvcc takes every kernel for sm_80 and sm_90, and no hot kernel keeps registers in memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cuda_ops.emulator import SOURCE

KERNELS = sorted((SOURCE / "gpu").glob("*.cu"))
ARCHITECTURES = ("80", "90")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def compile_for_gpus(nvcc: str, source: Path, out: Path) -> str:
    """What nvcc says; the register use of each kernel is part of it."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [nvcc, "-std=c++20", "-O3", *targets, f"-I{SOURCE / 'gpu'}", "-Xptxas", "-v"]
    finished = subprocess.run(
        ["nice", "-n", "10", *command, "-c", str(source), "-o", str(out / f"{source.stem}.o")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, f"{source.name}\n{finished.stderr}"
    return finished.stderr


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


def test_every_kernel_compiles_without_spills(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed; the kernels are compiled for the GPU where it is")
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda source: compile_for_gpus(nvcc, source, tmp_path), KERNELS))
    assert all("Compiling entry function" in report for report in reports)
    spills = [line for report in reports for line in spilling_kernels(report)]
    assert not spills, "\n".join(spills)

"""Collectives between real processes: exact sums, and a named culprit when a rank is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuda_ops
from cuda_ops import SharedMemoryGroup
from tests.checks import assert_same_bits
from tests.cuda_ops.builders import bf16, read

ROOT = Path(__file__).parents[2]


def run_ranks(
    scenario: str, path: Path, world_size: int, timeout: float = 30.0, absent: int = -1
) -> list[Any]:
    """Start one process per rank and return what each reported."""
    module = [sys.executable, "-m", "tests.cuda_ops.group_rank", scenario, str(path)]
    ranks = [
        subprocess.Popen(
            [*module, str(rank), str(world_size), str(timeout)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(world_size)
        if rank != absent
    ]
    try:
        return [report_of(process) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def report_of(rank: subprocess.Popen[str]) -> Any:
    out, err = rank.communicate(timeout=60)
    assert rank.returncode == 0, err
    return json.loads(out)


@pytest.fixture(autouse=True)
def _library_is_built() -> None:
    cuda_ops.set_num_threads(1)  # so that no rank spends its time building


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_every_rank_gets_the_exact_result_at_every_size(tmp_path, world_size):
    for report in run_ranks("collectives", tmp_path / "group", world_size):
        assert all(all(results) for results in report["result"].values()), report
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_sums_are_rounded_once(tmp_path):
    """1 + 2^-8 + 2^-8: rounding after each addition would lose what one rounding at the end keeps."""
    parts = [bf16(np.full((3, 5), value)) for value in (1.0, 2.0**-8, 2.0**-8)]

    def join(rank: int) -> None:
        SharedMemoryGroup(tmp_path / "group", rank, 3, 30).all_reduce(parts[rank])

    with ThreadPoolExecutor(3) as threads:  # a waiting rank holds no interpreter lock, so threads do
        list(threads.map(join, range(3)))
    for part in parts:
        assert_same_bits(read(part), np.full((3, 5), 1.0 + 2.0**-7, np.float32))


def test_a_rank_that_never_starts_is_named(tmp_path):
    reports = run_ranks("reduce_or_fail", tmp_path / "group", 3, timeout=1.5, absent=1)
    errors = [report["error"] for report in reports]
    assert any("SharedMemoryGroup.open: rank 1 did not join open within 1.5 s" in error for error in errors)
    assert all("rank 1 did not join" in error or "gave up" in error for error in errors)


def test_ranks_that_stop_calling_are_named(tmp_path):
    reports = run_ranks("absent", tmp_path / "group", 4, timeout=4)
    errors = [reports[0]["error"], reports[3]["error"]]
    assert any("SharedMemoryGroup.all_reduce: rank 1, 2 did not join all_reduce" in error for error in errors)


def test_a_rank_that_calls_something_else_is_named(tmp_path):
    errors = [report["error"] for report in run_ranks("different_calls", tmp_path / "group", 3)]
    assert "rank 1 called broadcast of 16 bytes while rank 0 called all_reduce of 16 bytes" in errors[0]
    assert "rank 0 called all_reduce of 16 bytes while rank 1 called broadcast" in errors[1]


def test_a_rank_that_gives_up_wakes_the_others(tmp_path):
    reports = run_ranks("give_up", tmp_path / "group", 3)
    assert ["rank 2 gave up" in report.get("error", "") for report in reports] == [True, True, False]


def test_another_thread_can_end_a_wait(tmp_path):
    reports = run_ranks("abort_own_wait", tmp_path / "group", 2)
    assert "rank 0 gave up while rank 0 waited in barrier" in reports[0]["error"]


def test_a_closed_group_says_so(tmp_path):
    group = SharedMemoryGroup(tmp_path / "group", 0, 1, 5)
    group.close()
    with pytest.raises(ValueError, match="SharedMemoryGroup: the group is closed"):
        group.barrier()


def test_a_gather_into_the_wrong_shape_is_refused(tmp_path):
    group = SharedMemoryGroup(tmp_path / "group", 0, 1, 5)
    with pytest.raises(ValueError, match=r"all_gather: out must be \[world_size, x's shape\]"):
        group.all_gather(np.zeros(4, np.float32), np.zeros((2, 4), np.float32))
    group.close()


def test_a_rank_outside_the_world_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"rank must lie in \[0, world_size\)"):
        SharedMemoryGroup(tmp_path / "group", 3, 2, 5)

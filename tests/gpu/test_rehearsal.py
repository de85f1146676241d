"""The programs that measure a GPU run to their end without one, and would notice what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed; the programs for a GPU need it")

import torch

from tests.bench.result_files import save
from tests.gpu import all as everything
from tests.gpu.case import Answer
from tests.gpu.correctness import check_ops
from tests.gpu.machine import open_machine
from tests.gpu.rank_step import measure_rank
from tests.gpu.readme import NOTHING, README, tables, update_readme
from tests.gpu.serving import TINY_NAME, Load, measure_serving, started_server
from tests.gpu.speed import measure_ops


def test_every_op_is_right_on_fresh_inputs(rand) -> None:
    count, wrong = check_ops(is_small=True, is_emulated=True, seed=rand.seed)
    assert not wrong, "\n".join(wrong)
    assert count > 35


def test_a_wrong_answer_names_the_worst_place_and_both_values() -> None:
    actual, expected = torch.tensor([1.0, 2.0, 3.5]), torch.tensor([1.0, 2.0, 3.0])
    assert Answer("out", actual, expected).complaint() == "out[2] is 3.5, not 3 (allowed: 0.023)"
    assert Answer("out", torch.tensor([torch.nan]), torch.tensor([1.0])).complaint() is not None
    assert Answer("out", torch.tensor([-torch.inf]), torch.tensor([-torch.inf])).complaint() is None


def test_every_op_has_a_share_of_the_ceilings() -> None:
    with open_machine(is_emulated=True) as machine:
        figures = measure_ops(machine, is_small=True)
    assert set(figures.pop("ceilings")) == {"read_gb_per_second", "copy_gb_per_second", "bf16_tflops"}
    assert all(found["us"] > 0 and found["share"] > 0 for found in figures.values())
    assert "anchor" in figures["moe_experts int4, 1 tokens, tiny"]


def test_a_rank_steps_with_the_workers_own_code() -> None:
    figures = measure_rank("small", is_emulated=True)
    assert figures["small decode, 2 sequences, 70 context"]["ms"] > 0
    assert figures["small decode, 1 sequences, 4000 context"]["ms"] is None  # more KV than there is room
    assert figures["small prefill, chunk of 20"]["tokens_per_second"] > 0


def test_processes_agree_on_their_sums(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.gpu.peers", "--world=2", "--emulated", f"--json={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(out.read_text()) == {"all-reduce between processes": {"ranks": 2, "wrong": []}}


def test_a_server_is_asked_for_prompts_of_the_wanted_length(tmp_path: Path) -> None:
    with started_server(tmp_path, ["--model", TINY_NAME, "--device", "cpu"]) as server:
        figures = measure_serving(server.address, Load(300, 8, (56, 56), (1, 2), 1))
    assert figures["serving, 2 clients"]["requests"] == 2
    for found in figures.values():
        assert found["prompt_tokens"] == pytest.approx(300, rel=0.1)


def test_a_step_that_fails_costs_its_own_figures_alone(tmp_path: Path) -> None:
    steps = [
        everything.Step("fails", "tests.gpu.no_such_module"),
        everything.Step("is not there", "json.tool", before=("no-such-program",)),
        everything.Step("works", "tests.gpu.speed", ("--small", "--emulated"), 200),
    ]
    figures, outcomes = everything.run_steps(steps, 300)
    words = {name: outcome.rsplit(" after", 1)[0] for name, outcome in outcomes.items()}
    assert words["fails"] == "failed with 1"
    assert words["is not there"] == "not run (no-such-program is not installed)"
    assert words["works"] == "done" and figures["ceilings"]["bf16_tflops"] > 0


def test_idle_time_is_what_tokens_take_beyond_the_step() -> None:
    figures = {
        "serving, 16 clients": {"gap_ms_p50": 7.5},
        "28b decode, 16 sequences, 3700 context": {"ms": 6.0},
        "serving, 1 clients": {"gap_ms_p50": 4.0},
        "28b decode, 1 sequences, 3700 context": {"ms": None},
    }
    everything.add_idle_times(figures)
    assert figures["idle between steps, 16 sequences"] == {"ms": 1.5}
    assert "idle between steps, 1 sequences" not in figures


def test_the_readme_shows_the_newest_result_of_each_device(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README.read_text() + "behind\n")
    update_readme(tmp_path / "none", readme)
    assert NOTHING in readme.read_text()
    save("h100", {"ceilings": {"read_gb_per_second": 2950.0}}, gpu="H100", folder=tmp_path / "results")
    update_readme(tmp_path / "results", readme)
    text = readme.read_text()
    assert "| ceilings | read_gb_per_second 2950 |" in text and NOTHING not in text
    assert text.endswith("behind\n")


def test_the_readmes_table_is_that_of_the_kept_results() -> None:
    assert tables(everything.RESULTS) in README.read_text()


def test_a_machine_without_a_gpu_is_told_what_is_needed() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit, match=r"tests/gpu/run.sh needs a GPU and a PyTorch with CUDA: .*"):
        everything.find_device()

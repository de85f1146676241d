"""Octet against what Hugging Face transformers answered, and against itself in other layouts and widths.

The goldens and how they were made are in tests/golden; no torch is needed here.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from models.tiny import write_tiny_checkpoint
from models.tiny_config import Layout
from tests.checks import assert_close, assert_same_bits
from tests.golden.cases import CASES, FOLDER, PRESETS, WEIGHT_SEED, Golden, load_golden
from tests.workers.loaded_ranks import LoadedRanks, LogitsRecorder, greedy_ids, prefill_rows

WIDE_CASE = "image-and-video"  # the one that exercises everything, for comparisons of Octet with itself


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Layout], Path]:
    layouts: list[Layout] = ["paddle", "pt"]
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        (preset, layout): write_tiny_checkpoint(root / preset / layout, layout, WEIGHT_SEED, preset)
        for preset in PRESETS
        for layout in layouts
    }


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> LogitsRecorder:
    return LogitsRecorder(monkeypatch)


def read_golden(preset: str, case: str) -> Golden:
    return load_golden(FOLDER / preset / f"{case}.npz")


def prefill(
    folder: Path, golden: Golden, tmp_path: Path, recorder: LogitsRecorder, world: int = 1
) -> np.ndarray:
    ranks = LoadedRanks(folder, tmp_path, world)
    return prefill_rows(ranks, golden.case, golden.rows, recorder)[:, : golden.logits.shape[1]]


@pytest.mark.parametrize("preset", PRESETS)
def test_goldens_were_made_from_these_weights(checkpoints: dict, preset: str):
    weights = (checkpoints[preset, "pt"] / "model.safetensors").read_bytes()
    digests = {read_golden(preset, case).weights_sha256 for case in CASES}
    assert digests == {hashlib.sha256(weights).hexdigest()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("preset", PRESETS)
def test_prefill_logits_equal_those_of_transformers(
    checkpoints: dict, tmp_path: Path, recorder: LogitsRecorder, preset: str, case: str
):
    golden = read_golden(preset, case)
    logits = prefill(checkpoints[preset, "pt"], golden, tmp_path, recorder)
    assert_close(logits, golden.logits, 1e-4, f"{preset} {case}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("preset", PRESETS)
def test_greedy_tokens_are_those_of_transformers(
    checkpoints: dict, tmp_path: Path, recorder: LogitsRecorder, preset: str, case: str
):
    golden = read_golden(preset, case)
    ranks = LoadedRanks(checkpoints[preset, "paddle"], tmp_path)
    assert greedy_ids(ranks, golden.case, len(golden.greedy)) == golden.greedy.tolist()


def test_other_pixels_give_other_logits(checkpoints: dict, tmp_path: Path, recorder: LogitsRecorder):
    golden = read_golden("golden", "image")
    golden.case.media[0].patches[:] ^= 255
    logits = prefill(checkpoints["golden", "pt"], golden, tmp_path, recorder)
    assert np.abs(logits[-1] - golden.logits[-1]).max() > 1e-2


@pytest.mark.parametrize("preset", PRESETS)
def test_both_layouts_give_the_same_bits(
    checkpoints: dict, tmp_path: Path, recorder: LogitsRecorder, preset: str
):
    golden = read_golden(preset, WIDE_CASE)
    paddle = prefill(checkpoints[preset, "paddle"], golden, tmp_path, recorder)
    pt = prefill(checkpoints[preset, "pt"], golden, tmp_path, recorder)
    assert_same_bits(paddle, pt, preset)


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("preset", PRESETS)
def test_any_number_of_ranks_gives_the_same_logits(
    checkpoints: dict, tmp_path: Path, recorder: LogitsRecorder, preset: str, world: int
):
    golden = read_golden(preset, WIDE_CASE)
    alone = prefill(checkpoints[preset, "paddle"], golden, tmp_path, recorder)
    together = prefill(checkpoints[preset, "paddle"], golden, tmp_path, recorder, world)
    assert_close(together, alone, 1e-5, f"{world} ranks")

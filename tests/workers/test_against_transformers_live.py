"""Octet against Hugging Face transformers, run side by side on weights and prompts nobody has seen before.

The goldens pin one model; this draws a new one each time. Needs torch and transformers, skips without.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from models.tiny import write_tiny_checkpoint
from tests.checks import assert_close
from tests.conftest import Rand
from tests.golden.cases import NUM_GREEDY, PRESETS, make_cases, media_ids
from tests.workers.loaded_ranks import LoadedRanks, LogitsRecorder, greedy_ids, prefill_rows

pytestmark = [
    pytest.mark.compare,
    pytest.mark.filterwarnings("ignore"),  # not our libraries' to keep quiet
]


@pytest.mark.parametrize("preset", PRESETS)
def test_fresh_model_answers_as_transformers_does(
    rand: Rand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
):
    pytest.importorskip("torch", reason="the live comparison needs torch: OCTET_EXTRAS=compare")
    pytest.importorskip("transformers", reason="the live comparison needs transformers: OCTET_EXTRAS=compare")
    from tests.golden.transformers_reference import TransformersReference

    folder = write_tiny_checkpoint(tmp_path / "model", "pt", rand.seed, preset)
    reference = TransformersReference(folder)
    ranks, recorder = LoadedRanks(folder, tmp_path), LogitsRecorder(monkeypatch)
    for case in make_cases(media_ids(preset), rand.seed):
        expected = reference.logits(case)
        rows = (~case.is_media).nonzero()[0]
        where = f"{case.name}, {rand}"
        assert_close(prefill_rows(ranks, case, rows, recorder), expected[rows], 1e-4, where)

    last = case  # an image and a video
    generated = greedy_ids(ranks, last, NUM_GREEDY)
    assert_greedy(reference.logits(last, generated[:-1])[len(last.token_ids) - 1 :], generated, str(rand))


def assert_greedy(logits, generated: list[int], where: str) -> None:
    """Every generated token is the likeliest one, up to the rounding that two implementations may have."""
    for index, (row, token) in enumerate(zip(logits, generated, strict=True)):
        best = row[: media_ids(PRESETS[0]).patch].max()
        assert row[token] >= best - 2e-4, f"token {index} of {where}: {token} is not the likeliest"

"""A quantised model computes what the same model does with its rounded weights written out in fp32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from models.tiny import write_tiny_checkpoint
from tests.checks import assert_close
from tests.golden.cases import PRESETS, make_cases, media_ids
from tests.workers.checkpoints import Tensors, change_tensors, quantise
from tests.workers.loaded_ranks import LoadedRanks, LogitsRecorder, prefill_rows


def round_weights(tensors: Tensors, mode: str) -> Tensors:
    """Every decoder linear and the head of a -PT checkpoint replaced by its rounded values.

    Specification 8.1 and 8.2, with a head as workers/quant.py has it on a CPU; a tied one comes apart.
    """
    rounded = dict(tensors)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    linears = {name: matrix for name, matrix in tensors.items() if _is_decoder_linear(name)}
    for name, matrix in (linears | {"lm_head.weight": head}).items():
        if mode.startswith("wint4") and ".mlp.experts." in name:
            group, largest = 64 if matrix.shape[1] % 64 == 0 else 32, 7
        elif mode == "wint4-all":
            group, largest = 32, 7
        else:
            group, largest = matrix.shape[1], 127
        integers, scales = quantise(matrix, group, largest)
        grouped = integers.reshape(len(matrix), -1, group) * scales[..., None]
        rounded[name] = grouped.reshape(matrix.shape).astype(np.float32)
    return rounded


def _is_decoder_linear(name: str) -> bool:
    return name.startswith("model.layers.") and "_proj.weight" in name


@pytest.mark.parametrize("mode", ["wint8", "wint4", "wint4-all"])
@pytest.mark.parametrize("preset", PRESETS)
def test_quantised_logits_are_those_of_the_rounded_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, mode: str
):
    case = make_cases(media_ids(preset), 5)[-1]
    rows = np.flatnonzero(~case.is_media)
    folder = write_tiny_checkpoint(tmp_path / "model", "pt", 5, preset)
    recorder = LogitsRecorder(monkeypatch)
    exact = prefill_rows(LoadedRanks(folder, tmp_path), case, rows, recorder)
    quantised = prefill_rows(LoadedRanks(folder, tmp_path, quantization=mode), case, rows, recorder)
    change_tensors(folder, lambda tensors: round_weights(tensors, mode))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    rounded = prefill_rows(LoadedRanks(folder, tmp_path), case, rows, recorder)
    assert_close(quantised, rounded, 1e-3, mode)
    assert np.abs(quantised - exact).max() > 1e-2  # rounding was not skipped

"""What `./run.sh quality` measures, against NumPy and against the model that is served."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ConfigError
from engine.messages import Chunk, NewSequence, SamplingParams, StepPlan
from engine.model_config import read_model_config
from models.tiny import write_tiny_checkpoint
from tests.checks import assert_close
from tests.conftest import Rand
from tests.workers.checkpoints import (
    Tensors,
    change_config,
    change_tensors,
    make_model,
    quantise,
    read_tensors,
    write_checkpoint,
)
from tests.workers.loaded_ranks import LoadedRanks, LogitsRecorder
from workers.checkpoint import Checkpoint
from workers.device.paddle import PaddleCpu
from workers.quality import PER_CHANNEL, _Stream, measure, rounded, weight_error
from workers.quality_command import main
from workers.quality_prompts import BUILT_IN, read_prompts
from workers.quant import Format

PROMPTS = [[3, 14, 15, 92, 65, 35], [7] * 9, list(range(20, 90))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """-PT layout: matrices are stored [out, in], as NumPy wants them here."""
    return write_checkpoint(tmp_path_factory.mktemp("model"), make_model(num_shared_experts=1), "pt")


# weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", [Format("int8"), Format("int4", 64), Format("int4", 32), Format("int4", 128)]
)
def test_round_trip_is_that_of_the_specification(rand: Rand, form: Format):
    matrix = rand.normal(24, 128)
    group, largest = (form.group, 7) if form.kind == "int4" else (128, 127)
    integers, scales = quantise(matrix, group, largest)
    expected = (integers.reshape(24, -1, group) * scales[..., None]).reshape(matrix.shape)
    assert_close(rounded(PaddleCpu(), matrix, form), expected, 0.0, str(form))


@pytest.mark.parametrize("variant", ["wint8", "wint4", PER_CHANNEL, "wint4-all"])
def test_error_of_a_layer_is_that_of_its_quantised_matrices(checkpoint: Path, variant: str):
    squares = total = 0.0
    for name, matrix in read_tensors(checkpoint / "model.safetensors").items():
        if ".layers.1." not in name or "_proj.weight" not in name:
            continue
        is_routed = ".experts." in name
        is_int4 = variant == "wint4-all" or (variant != "wint8" and is_routed)
        groups = {"wint4": 64, "wint4-all": 64 if is_routed else 32}
        group = groups.get(variant, matrix.shape[1]) if is_int4 else matrix.shape[1]
        integers, scales = quantise(matrix, group, 7 if is_int4 else 127)
        difference = (integers.reshape(len(matrix), -1, group) * scales[..., None]).reshape(
            matrix.shape
        ) - matrix
        squares += float((difference.astype(np.float64) ** 2).sum())
        total += float((matrix.astype(np.float64) ** 2).sum())
    # q, k and v share no scale, so that they are apart in this layout changes nothing.
    opened = Checkpoint(checkpoint, read_model_config(checkpoint))
    found = weight_error(opened, PaddleCpu(), 1, variant)
    opened.close()
    assert found == pytest.approx((squares / total) ** 0.5, rel=1e-4)


# answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["bfloat16", "wint8", "wint4", "wint4-all"])
def test_answers_are_those_of_the_served_model(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
):
    model = read_model_config(checkpoint)
    stream = _Stream(str(checkpoint), model, PaddleCpu(), PROMPTS, quantization)
    for layer in range(model.num_layers):
        stream.advance(layer)
        stream.forget_layer()
    last_rows = np.cumsum([len(prompt) for prompt in PROMPTS]) - 1
    found = stream.log_probabilities(slice(0, stream.num_tokens))[last_rows]
    stream.close()

    recorder = LogitsRecorder(monkeypatch)
    ranks = LoadedRanks(checkpoint, tmp_path, quantization=quantization)
    size = ranks.block_size
    chunks, news, block = [], [], 0
    for index, prompt in enumerate(PROMPTS):
        count = -(-len(prompt) // size)
        chunks.append(Chunk(index, len(prompt), list(range(block, block + count)), True))
        news.append(NewSequence(index, prompt, len(prompt), SamplingParams(max_tokens=1)))
        block += count
    ranks.run(StepPlan(0, chunks, news))
    logits = recorder.steps[0][:, : model.vocab_size].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert_close(found, expected, 1e-4, quantization)


def test_finer_formats_are_nearer_to_the_reference(checkpoint: Path):
    found = {
        one.name: one for one in measure(str(checkpoint), read_model_config(checkpoint), PaddleCpu(), PROMPTS)
    }
    wint8, wint4 = found["wint8"], found["wint4"]
    for layer in (0, 1):
        assert 0 < wint8.layers[layer].weights < 0.01
        assert 0 < wint8.layers[layer].stream < 0.1
    assert wint4.layers[0] == wint8.layers[0]  # a dense layer is int8 in both
    assert wint4.layers[1].weights > 5 * wint8.layers[1].weights
    assert wint4.layers[1].output > wint8.layers[1].output
    assert 0 < wint8.kl < wint4.kl <= wint4.kl_worst
    assert wint4.kl < found["wint4-all"].kl
    assert 0.5 < wint4.top1 <= wint8.top1 <= 1.0


def test_groups_bear_outliers_that_a_channel_does_not(tmp_path: Path):
    def add_outliers(tensors: Tensors) -> None:
        for name, matrix in tensors.items():
            if ".experts." in name:
                matrix = matrix.copy()
                matrix[:, 0] = 8 * np.abs(matrix).max()
                tensors[name] = matrix

    folder = change_tensors(write_checkpoint(tmp_path, make_model(), "pt"), add_outliers)
    grouped, channel = measure(
        str(folder), read_model_config(folder), PaddleCpu(), PROMPTS, ("wint4", PER_CHANNEL)
    )
    assert channel.layers[1].weights > 1.2 * grouped.layers[1].weights
    assert channel.layers[1].output > 1.2 * grouped.layers[1].output


# prompts and command ------------------------------------------------------------------------------


def test_prompts_are_text_or_ids(tmp_path: Path):
    folder = tmp_path / "model"
    write_tiny_checkpoint(folder)
    vocab_size = read_model_config(folder).vocab_size
    assert len(read_prompts("", folder, vocab_size)) == len(BUILT_IN)
    file = tmp_path / "prompts"
    file.write_text("Hello there\n\n[5, 6, 7]\n[not ids\n")
    text, ids, odd = read_prompts(str(file), folder, vocab_size)
    assert ids == [5, 6, 7]
    assert len(text) > 1 and len(odd) > 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("", "holds no prompt"), ("[1, 9999999]", "beyond the vocabulary"), ("some text", "has no tokenizer")],
)
def test_prompts_that_cannot_be_used_are_refused(tmp_path: Path, content: str, sentence: str):
    file = tmp_path / "prompts"
    file.write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        read_prompts(str(file), tmp_path, 1000)


def test_command_prints_a_table_and_writes_json(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts, out = tmp_path / "prompts", tmp_path / "out.json"
    prompts.write_text("[3, 4, 5, 6]\n[9, 8, 7]\n")
    line = ["--model", str(checkpoint), "--quant", "wint4", "--prompts", str(prompts), "--json", str(out)]
    assert main(line) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["tokens"] == 7
    assert [one["name"] for one in report["variants"]] == ["wint4", PER_CHANNEL]
    for one in report["variants"]:
        assert f"{one['kl']:.5f}" in printed and f"{100 * one['layers'][1]['weights']:.2f}" in printed


def test_command_refuses_what_has_no_bf16_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--model", str(tmp_path / "none")]) == 2
    folder = write_checkpoint(tmp_path / "model", make_model())
    change_config(folder, quantization_config={"quantization": "wint8"})
    assert main(["--model", str(folder)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "is no folder" in errors[0] and "quantised already" in errors[1]

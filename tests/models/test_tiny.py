"""The tiny checkpoints: the same bytes everywhere, complete, with the real tokenizer in small."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from safetensors import safe_open

from api.template import load_template
from api.tokenizer import Tokenizer, load_tokenizer
from engine.model_config import ModelConfig, read_model_config
from engine.model_source import check_model_folder
from models.tiny import PRESETS, write_tiny_checkpoint
from models.tiny_config import Layout

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS: list[Layout] = ["paddle", "pt"]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("embedded"))


@pytest.fixture(scope="module")
def tokenizer(embedded: Path) -> Tokenizer:
    return load_tokenizer(embedded)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# the writer ---------------------------------------------------------------------------------------


def test_two_processes_write_the_same_bytes(tmp_path: Path):
    for name, hash_seed in (("one", "1"), ("two", "2")):
        command = [
            sys.executable,
            "-m",
            "models.tiny",
            str(tmp_path / name),
            "--layout",
            "both",
            "--seed",
            "4",
        ]
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=60)
    first = digests(tmp_path / "one")
    assert first == digests(tmp_path / "two")
    assert {name.partition("/")[0] for name in first} == set(LAYOUTS)
    assert sum(file.stat().st_size for file in (tmp_path / "one").rglob("*") if file.is_file()) < 80e6


def test_another_seed_gives_other_weights(tmp_path: Path):
    one, two = (write_tiny_checkpoint(tmp_path / str(seed), "pt", seed, "golden") for seed in (1, 2))
    assert digests(one)["config.json"] == digests(two)["config.json"]
    assert digests(one)["model.safetensors"] != digests(two)["model.safetensors"]


@pytest.mark.parametrize("preset", PRESETS)
def test_both_layouts_describe_the_same_model(tmp_path: Path, preset: str):
    configs: list[ModelConfig] = [
        read_model_config(write_tiny_checkpoint(tmp_path / layout, layout, 0, preset)) for layout in LAYOUTS
    ]
    assert configs[0] == configs[1]


def test_embedded_checkpoint_has_the_files_and_the_shape_that_serving_needs(embedded: Path):
    check_model_folder(embedded)
    config = read_model_config(embedded)
    assert (config.family, config.num_heads, config.num_kv_heads) == ("vl", 8, 8)
    assert (config.num_pools, config.num_shared_experts, config.moe_layers) == (2, 1, (1, 2, 3))
    assert config.dtype == "bfloat16" and config.max_position_embeddings == 131072
    assert all(width % (8 * 32) == 0 for width in config.moe_intermediate_sizes)
    with safe_open(embedded / "model.safetensors", "numpy") as file:  # the library reads what we wrote
        assert file.get_tensor("ernie.layers.1.mlp.moe_statics.e_score_correction_bias").any()


# the tokenizer ------------------------------------------------------------------------------------


def test_special_tokens_have_the_published_places(embedded: Path, tokenizer: Tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(embedded / "tokenizer.model"))
    assert [pieces.id_to_piece(i) for i in range(13)] == ["<unk>", "<s>", "</s>", *"0123456789"]
    config = read_model_config(embedded)
    assert config.image_patch_id == pieces.get_piece_size()
    names = {
        "<|IMAGE_PLACEHOLDER|>": config.image_patch_id,
        "<|IMAGE_START|>": config.image_start_id,
        "<|IMAGE_END|>": config.image_end_id,
        "<|VIDEO_START|>": config.video_start_id,
        "<|VIDEO_END|>": config.video_end_id,
    }
    assert {name: tokenizer.token_id(name) for name in names} == names
    assert config.vocab_size >= tokenizer.vocab_size


def test_structure_tokens_are_single_and_never_use_the_vision_experts(embedded: Path, tokenizer: Tokenizer):
    config = read_model_config(embedded)
    for name in ("<|begin_of_sentence|>", "<|end_of_sentence|>", "<think>", "</think>", "<tool_call>"):
        token_id = tokenizer.token_id(name)
        assert token_id is not None and token_id < config.image_patch_id, name
    assert tokenizer.end_token_ids == config.eos_token_ids


@pytest.mark.parametrize(
    "text",
    ["The picture shows a red circle.", " leading space", "你好，世界", "naïve 🙂 \t\n\n x", "a  b", "12:05"],
)
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_begins_without_a_dummy_space(tokenizer: Tokenizer):
    assert tokenizer.decode(tokenizer.encode("User")[:1]).startswith("U")


def test_template_of_the_checkpoint_writes_the_published_prompt(embedded: Path):
    template = load_template("", embedded, "vl")
    assert str(embedded) in template.origin
    messages = [{"role": "user", "content": "Hi"}]
    prompt = template.render(messages, kwargs={"enable_thinking": False})
    assert prompt == "<|begin_of_sentence|>User: Hi\nAssistant: <think>\n\n</think>\n\n"


def test_stand_in_tokenizer_has_the_published_ids(tmp_path: Path):
    command = [sys.executable, "-m", "models.tiny", str(tmp_path / "t"), "--tokenizer-only"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    added = json.loads((tmp_path / "t" / "added_tokens.json").read_text())
    expected = {
        "<|IMAGE_PLACEHOLDER|>": 100295,
        "<|AUDIO_PLACEHOLDER|>": 100296,
        "<|LOC_0|>": 100297,
        "<|LOC_1000|>": 101297,
        "<|LOC_SEP|>": 101300,
        "<|IMAGE_SEP|>": 101303,
        "<|IMAGE_START|>": 101304,
        "<|VIDEO_END|>": 101307,
        "<|ASR_END|>": 101309,
    }
    assert {name: added[name] for name in expected} == expected
    tokenizer = load_tokenizer(tmp_path / "t")
    assert {name: tokenizer.token_id(name) for name in expected} == expected
    assert tokenizer.decode([60000, 100294]) == " w60000 w100294"

"""What --model may be, what it resolves to, and how it is refused."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from engine import model_source
from engine.errors import ConfigError
from engine.model_config import read_model_config
from engine.model_source import TINY_NAME, preset_names, resolve_model
from models.tiny import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OCTET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def make_folder(path: Path, *files: str) -> Path:
    path.mkdir()
    for name in files:
        (path / name).write_text("{}")
    return path


# folders ------------------------------------------------------------------------------------------


def test_complete_folder_is_used_as_it_is(tmp_path: Path):
    folder = make_folder(tmp_path / "m", "config.json", "tokenizer.model", "model.safetensors")
    assert resolve_model(str(folder)) == folder


def test_incomplete_folder_is_refused_with_everything_it_lacks(tmp_path: Path):
    folder = make_folder(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"lacks config.json, a tokenizer .*, weights"):
        resolve_model(str(folder))


def test_missing_shards_of_the_index_are_named(tmp_path: Path):
    folder = make_folder(tmp_path / "m", "config.json", "tokenizer.json", "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"lacks b\.safetensors$"):
        resolve_model(str(folder))


def test_dummy_weights_and_another_tokenizer_need_neither_in_the_folder(tmp_path: Path):
    folder = make_folder(tmp_path / "m", "config.json")
    assert resolve_model(str(folder), load_format="dummy", needs_tokenizer=False) == folder


def test_file_instead_of_folder_is_refused(tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text("{}")
    with pytest.raises(ConfigError, match="is a file"):
        resolve_model(str(file))


def test_unknown_name_is_refused_with_the_nearest_preset(cache: Path):
    with pytest.raises(ConfigError, match=r"nearest is ernie-4\.5-vl-28b-a3b"):
        resolve_model("ernie-45-vl-28b", load_format="dummy")


# presets and the tiny model ------------------------------------------------------------------------


def test_preset_without_dummy_weights_is_refused(cache: Path):
    with pytest.raises(ConfigError, match="--load-format dummy"):
        resolve_model("ernie-4.5-0.3b")


def test_preset_folder_has_its_config_and_a_tokenizer_with_the_published_media_ids(cache: Path):
    folder = resolve_model("ernie-4.5-vl-28b-a3b", load_format="dummy")
    config = read_model_config(folder)
    added = json.loads((folder / "added_tokens.json").read_text())
    assert folder.is_relative_to(cache) and folder.name == "ernie-4.5-vl-28b-a3b"
    assert config.num_layers == 28
    assert added["<|IMAGE_PLACEHOLDER|>"] == config.image_patch_id == 100295
    assert added["<|IMAGE_START|>"] == config.image_start_id == 101304
    assert added["<|VIDEO_END|>"] == config.video_end_id == 101307
    assert (folder / "tokenizer.model").is_file() and (folder / "chat_template.jinja").is_file()


def test_without_a_name_the_trained_model_is_served_where_there_is_one(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(model_source, "DEMO", tmp_path / "demo")
    assert resolve_model("") == resolve_model(TINY_NAME)
    assert model_source.default_name() == "octet-tiny"
    write_tiny_checkpoint(tmp_path / "demo")
    assert resolve_model("") == tmp_path / "demo"
    assert model_source.default_name() == "octet-demo"


def test_the_tiny_model_is_written_once_and_announced(cache: Path):
    lines: list[str] = []
    first = resolve_model(TINY_NAME, say=lines.append)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(TINY_NAME, say=lines.append) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert len(lines) == 1 and "tiny" in lines[0]
    assert (first.parent / "pt" / "model.safetensors").is_file()
    assert not list(cache.glob(".writing-*"))


def test_processes_that_start_together_write_the_tiny_model_once(cache: Path):
    code = "from engine.model_source import resolve_model; print(resolve_model('octet-tiny', say=print))"
    command = [sys.executable, "-c", code]
    racers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [racer.communicate(timeout=60)[0].splitlines() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert len({lines[-1] for lines in outputs}) == 1
    assert sum(len(lines) - 1 for lines in outputs) == 1  # one of them announced that it writes


def test_failed_writing_leaves_no_folder_behind(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match="could not write"):
        resolve_model(TINY_NAME)
    assert not list(cache.glob("tiny-*"))


def test_resolving_imports_no_numpy(cache: Path):
    code = (
        "import sys, engine.model_source as m; m.resolve_model('octet-tiny'); print('numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n"


def test_every_preset_has_a_name():
    assert "ernie-4.5-vl-424b-a47b" in preset_names()


# the hub ------------------------------------------------------------------------------------------


def test_offline_without_a_cached_copy_is_refused_naming_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(ConfigError, match=f"not in the cache {tmp_path / 'hub'}.*--offline"):
        resolve_model("some-org/some-model", offline=True)


def test_only_harmless_files_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    asked: dict[str, object] = {}
    folder = make_folder(tmp_path / "m", "config.json", "tokenizer.model", "model.safetensors")

    def record(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    assert resolve_model("some-org/some-model") == folder
    assert asked["repo"] == "some-org/some-model"
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert {pattern.rpartition(".")[2] for pattern in patterns} == {
        "json",
        "model",
        "jinja",
        "ttf",
        "safetensors",
    }


def test_failed_download_says_why(monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    def fail(*_: object, **__: object) -> str:
        raise OSError("connection refused")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError, match="some-org/some-model could not be downloaded: connection refused"):
        resolve_model("some-org/some-model")

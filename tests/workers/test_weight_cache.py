"""A second start maps what the first one kept, and never serves anything else."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.config import ServerConfig
from engine.model_config import read_model_config
from engine.plan_server import weight_cache_of
from tests.checks import assert_same_bits
from tests.workers.checkpoints import arrays_of, change_tensors, load, make_model, write_checkpoint
from workers import weight_cache, weight_cache_key
from workers.device.paddle import PaddleCpu
from workers.model.weights import ModelWeights
from workers.weight_cache import WeightCache, list_entries
from workers.weight_cache_command import main
from workers.weight_cache_key import cache_key
from workers.weight_tree import put_together, take_apart


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", make_model(dtype="bfloat16", num_shared_experts=1))


def cached_load(folder: Path, cache: Path, rank: int = 0, world: int = 1, **settings: Any) -> ModelWeights:
    """Load as a rank does, and wait until the entry is written."""
    weights = load(folder, rank, world, weight_cache=str(cache), **settings)
    for thread in threading.enumerate():
        if thread.name == "weight-cache":
            thread.join()
    return weights


def only_entry(cache: Path) -> Path:
    (entry,) = cache.glob("*.weights")
    return entry


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def assert_same(found: ModelWeights, expected: ModelWeights) -> None:
    left, right = arrays_of(found), arrays_of(expected)
    assert left.keys() == right.keys()
    for name, array in right.items():
        assert_same_bits(left[name], array, name)


# the second start ---------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["bfloat16", "wint8", "wint4"])
def test_second_start_maps_the_same_weights(checkpoint: Path, tmp_path: Path, quantization: str):
    cache = tmp_path / "cache"
    first = cached_load(checkpoint, cache, 1, 2, quantization=quantization)
    assert not is_mapped(only_entry(cache))
    second = cached_load(checkpoint, cache, 1, 2, quantization=quantization)
    assert is_mapped(only_entry(cache))
    assert_same(second, first)


def test_second_start_reads_nothing_of_the_checkpoint_but_headers(checkpoint: Path, tmp_path: Path):
    """Zeros where the tensors were are not noticed if size, header and time are as before."""
    first = cached_load(checkpoint, tmp_path / "cache")
    file = checkpoint / "model.safetensors"
    status, data = file.stat(), file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(data[:start] + bytes(len(data) - start))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert_same(cached_load(checkpoint, tmp_path / "cache"), first)


def test_mapped_weights_outlive_their_entry(checkpoint: Path, tmp_path: Path):
    first = cached_load(checkpoint, tmp_path / "cache")
    second = cached_load(checkpoint, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert_same(second, first)


def test_tied_head_is_stored_and_mapped_once(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "model", make_model(tied=True))
    cached_load(folder, tmp_path / "cache")
    weights = cached_load(folder, tmp_path / "cache")
    assert weights.decoder.lm_head.data is weights.decoder.embed_tokens


def test_progress_of_a_mapped_start_reaches_its_total(checkpoint: Path, tmp_path: Path):
    cached_load(checkpoint, tmp_path / "cache")
    cache, device = WeightCache(tmp_path / "cache"), PaddleCpu()
    seen: list[tuple[int, int]] = []
    assert cache.load(only_entry(tmp_path / "cache").stem, device, lambda *bytes_: seen.append(bytes_))
    assert seen[-1][0] == seen[-1][1] > 1_000_000
    assert [loaded for loaded, _ in seen] == sorted(loaded for loaded, _ in seen)


# the key ------------------------------------------------------------------------------------------


def key_of(folder: Path, rank: int = 0, world: int = 1, device: str = "cpu", **settings: Any) -> str:
    config = ServerConfig(**{"model": str(folder), "quantization": "bfloat16", **settings})
    return cache_key(config, read_model_config(folder, config.config_overrides), device, rank, world)


def test_key_names_everything_that_decides_the_bytes(checkpoint: Path):
    keys = [
        key_of(checkpoint),
        key_of(checkpoint, quantization="wint4"),
        key_of(checkpoint, dtype="float32"),
        key_of(checkpoint, 0, 2),
        key_of(checkpoint, 1, 2),
        key_of(checkpoint, device="gpu:0 NVIDIA H800"),
        key_of(checkpoint, config_overrides={"num_hidden_layers": 1}),
        key_of(checkpoint, load_format="dummy"),
        key_of(checkpoint, load_format="dummy", seed=1),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("pattern", weight_cache_key._SOURCES)
def test_every_source_that_the_key_names_exists(pattern: str):
    assert any(weight_cache_key._ROOT.glob(pattern)), f"nothing matches {pattern}"


def test_key_ignores_what_does_not_matter(checkpoint: Path):
    assert key_of(checkpoint) == key_of(checkpoint, port=9, max_num_seqs=3, seed=5)
    assert key_of(checkpoint, device="gpu:0 A") == key_of(checkpoint, device="gpu:1 A")


def change_one_value(tensors: dict[str, np.ndarray]) -> None:
    name = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[name] = tensors[name] + np.asarray(1, tensors[name].dtype)


@pytest.mark.parametrize("change", ["values", "time", "name", "code"])
def test_changed_checkpoint_or_code_is_another_key(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, change: str
):
    before = key_of(checkpoint)
    file = checkpoint / "model.safetensors"
    match change:
        case "values":
            change_tensors(checkpoint, change_one_value)
        case "time":
            os.utime(file, ns=(0, 1))
        case "name":
            file.rename(checkpoint / "weights.safetensors")
        case "code":
            monkeypatch.setattr(weight_cache_key, "LAYOUT_VERSION", -1)
    assert key_of(checkpoint) != before


# damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "header", "empty", "other key"])
def test_damaged_entry_is_rebuilt_and_never_served(
    checkpoint: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    cache = tmp_path / "cache"
    first = cached_load(checkpoint, cache)
    entry = only_entry(cache)
    data = bytearray(entry.read_bytes())
    match damage:
        case "flipped bit":
            data[-len(data) // 3] ^= 16
        case "cut short":
            del data[-weight_cache.ALIGNMENT :]
        case "header":
            data[200] ^= 1
        case "empty":
            data.clear()
        case "other key":
            cached_load(checkpoint, tmp_path / "other", quantization="wint8")
            data = bytearray(only_entry(tmp_path / "other").read_bytes())
    entry.write_bytes(data)
    assert_same(cached_load(checkpoint, cache), first)
    assert "damaged" in caplog.text
    caplog.clear()
    again = cached_load(checkpoint, cache)
    assert is_mapped(only_entry(cache))  # the new entry
    assert_same(again, first)
    assert "damaged" not in caplog.text


def test_description_with_a_foreign_class_is_refused():
    for description in ({"kind": "Popen", "fields": {"args": {"value": "true"}}}, {"tensor": 3}, [], 1):
        with pytest.raises(ValueError, match="not one of ours"):
            put_together(description, [])


def test_weights_come_back_from_their_description(checkpoint: Path):
    weights = load(checkpoint, quantization="wint4")
    description, tensors = take_apart(weights)
    assert len(tensors) == len({id(tensor) for tensor in tensors})
    assert_same(put_together(description, tensors), weights)


# writing ------------------------------------------------------------------------------------------


def test_entry_appears_only_when_complete(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    cache = tmp_path / "cache"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_cache.os, "fsync", full)
    assert_same(cached_load(checkpoint, cache), load(checkpoint))
    assert "No space left" in caplog.text
    assert not list(cache.glob("*.weights")) and not list(cache.glob("*.partial"))


def test_entry_that_another_process_writes_is_left_to_it(checkpoint: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    cache.mkdir()
    with (cache / f"{key_of(checkpoint)}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cached_load(checkpoint, cache)
        assert not list(cache.glob("*.weights"))
    cached_load(checkpoint, cache)
    assert only_entry(cache).stem == key_of(checkpoint)


def test_rest_of_a_killed_writer_is_removed(checkpoint: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "0123.partial").write_bytes(b"half")
    cached_load(checkpoint, cache)
    assert not list(cache.glob("*.partial"))


def test_entry_used_longest_ago_leaves_when_the_limit_is_reached(checkpoint: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    for rank in range(3):
        cached_load(checkpoint, cache, rank, 4)
    size = list_entries(cache)[0].num_bytes
    for age, rank in enumerate((1, 0, 2)):
        os.utime(cache / f"{key_of(checkpoint, rank, 4)}.weights", (time.time() - 100 + age,) * 2)
    cached_load(checkpoint, cache, 1, 4)  # used now
    cached_load(checkpoint, cache, 3, 4, weight_cache_size=int(3.5 * size))
    left = {entry.about["rank"] for entry in list_entries(cache)}
    assert left == {1, 2, 3}


def test_weights_larger_than_the_limit_are_not_kept(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    cached_load(checkpoint, tmp_path / "cache", weight_cache_size=1 << 20)
    assert "more than --weight-cache-size allows" in caplog.text
    assert not list_entries(tmp_path / "cache")


def test_full_disk_is_said_and_left_alone(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(weight_cache.shutil, "disk_usage", lambda folder: usage._replace(free=1 << 20))
    cached_load(checkpoint, tmp_path / "cache")
    assert "the disk has no room" in caplog.text
    assert not list_entries(tmp_path / "cache")


# which models -------------------------------------------------------------------------------------


def test_only_large_models_from_files_are_kept_unless_a_folder_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OCTET_CACHE", "/somewhere")
    config, large = ServerConfig(), 1 << 30
    dummy = msgspec.structs.replace(config, load_format="dummy")
    assert weight_cache_of(config, large) == "/somewhere/weights"
    assert weight_cache_of(config, 255 << 20) == "off"
    assert weight_cache_of(dummy, large) == "off"
    assert weight_cache_of(msgspec.structs.replace(config, weight_cache="off"), large) == "off"
    assert weight_cache_of(msgspec.structs.replace(dummy, weight_cache="/here"), 1) == "/here"


# the command --------------------------------------------------------------------------------------


def test_command_lists_and_clears(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cache = tmp_path / "cache"
    cached_load(checkpoint, cache, 1, 2, quantization="wint4")
    (cache / "broken.weights").write_bytes(b"x")
    assert main(["--weight-cache", str(cache)]) == 0
    listed = capsys.readouterr().out
    assert f"{checkpoint} in wint4, rank 1 of 2" in listed
    assert "cannot be read" in listed and "2 entries" in listed
    assert main(["clear", "--unused", "1", "--weight-cache", str(cache)]) == 0
    assert "removed 0 entries" in capsys.readouterr().out
    assert main(["clear", "--weight-cache", str(cache)]) == 0
    assert "removed 2 entries" in capsys.readouterr().out
    assert not list_entries(cache)

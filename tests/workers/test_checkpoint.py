"""A checkpoint is read completely and exactly in every published form, or refused by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import ConfigError
from engine.model_config import read_model_config
from models.tiny_config import Layout
from models.tiny_weights import logical_tensors, make_values
from tests.checks import assert_same_bits
from tests.workers.checkpoints import (
    Tensors,
    change_config,
    change_tensors,
    make_model,
    read_tensors,
    split_into_shards,
    write_checkpoint,
    write_tensors,
)
from workers.checkpoint import INDEX_NAME, Checkpoint
from workers.checkpoint_inventory import LogicalTensor, Role, Scheme, model_tensors
from workers.shards import Part

PRESETS = Path(__file__).resolve().parents[2] / "models" / "presets"
LAYOUTS: list[Layout] = ["paddle", "pt"]


def open_checkpoint(folder: Path, **options: Any) -> Checkpoint:
    return Checkpoint(folder, read_model_config(folder), **options)


def whole(tensor: LogicalTensor) -> Part:
    columns = range(tensor.shape[1]) if len(tensor.shape) == 2 else None
    return Part((range(tensor.shape[0]),), columns)


def read_all(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {tensor.name: checkpoint.read(tensor, whole(tensor)) for tensor in model_tensors(checkpoint.model)}


def assert_same_tensors(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, values in actual.items():
        assert_same_bits(values, expected[name], name)


# the inventory ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "decoder", "scheme"),
    [
        ("ernie-4.5-vl-424b-a47b", 13434, "A"),
        ("ernie-4.5-vl-28b-a3b", 7163, "A"),
        # B splits qkv in three and every up_gate in two: 2 more per layer, 1 more per MLP.
        ("ernie-4.5-vl-424b-a47b", 13434 + 2 * 54 + 3 + 51 * 128, "B"),
        ("ernie-4.5-vl-28b-a3b", 7163 + 2 * 28 + 1 + 27 * 129, "B"),
        ("ernie-4.5-0.3b", 2 + 18 * 6, "A"),
    ],
)
def test_published_models_have_the_published_number_of_tensors(preset: str, decoder: int, scheme: Scheme):
    model = read_model_config(PRESETS / f"{preset}.json")
    tensors = list(model_tensors(model))
    names = [name for tensor in tensors for name in tensor.stored(scheme)]
    vision = sum(name.startswith("vision_model.") for name in names)
    resampler = sum(name.startswith("resampler_model.") for name in names)
    assert len(names) == len(set(names))
    assert (vision, resampler) == ((387, 15) if model.vision else (0, 0))
    assert len(names) - vision - resampler == decoder


def test_vision_experts_have_the_shape_that_settles_their_width():
    model = read_model_config(PRESETS / "ernie-4.5-vl-424b-a47b.json")
    stored = {k: v for tensor in model_tensors(model) for k, v in tensor.stored("A").items()}
    assert stored["layers.3.mlp.experts.63.up_gate_proj.weight"] == (8192, 7168)
    assert stored["layers.3.mlp.experts.64.up_gate_proj.weight"] == (8192, 3072)


# reading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_comes_back_as_it_was_made(tmp_path: Path, layout: Layout):
    model = make_model()
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, model, layout, seed=5))
    made = {tensor.name: make_values(tensor, model, 5) for tensor in logical_tensors(model)}
    assert_same_tensors(read_all(checkpoint), made)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_the_same_as_slices_of_the_whole(tmp_path: Path, layout: Layout):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, make_model(), layout))
    for tensor in model_tensors(checkpoint.model):
        if tensor.role not in (Role.QKV, Role.EXPERT_UP, Role.EXPERT_DOWN, Role.VOCAB):
            continue
        rows, columns = tensor.shape
        first, second = range(rows // 8, rows // 4), range(rows // 4, rows // 2 + rows // 8)  # the latter
        part = Part((first, second), range(columns // 2, columns))  # spans two of B's separate tensors
        expected = checkpoint.read(tensor, whole(tensor))[rows // 8 : rows // 2 + rows // 8, columns // 2 :]
        assert_same_bits(checkpoint.read(tensor, part), np.ascontiguousarray(expected), tensor.name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_with_an_index_read_like_one_file(tmp_path: Path, layout: Layout):
    single = open_checkpoint(write_checkpoint(tmp_path / "one", make_model(), layout))
    shards = split_into_shards(write_checkpoint(tmp_path / "many", make_model(), layout), 3)
    assert_same_tensors(read_all(open_checkpoint(shards)), read_all(single))


def test_shards_without_an_index_are_all_read(tmp_path: Path):
    single = open_checkpoint(write_checkpoint(tmp_path / "one", make_model()))
    folder = split_into_shards(write_checkpoint(tmp_path / "many", make_model()), 2)
    (folder / INDEX_NAME).unlink()
    assert_same_tensors(read_all(open_checkpoint(folder)), read_all(single))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: "ernie." + name if name.startswith("vision_model.") else name,
        lambda name: "model." + name if name.startswith("vision_model.") else name,
        lambda name: name.removeprefix("ernie."),
        lambda name: name.replace("ernie.resampler_model", "resampler_model"),
    ],
)
def test_exports_may_put_the_prefix_elsewhere(tmp_path: Path, rename: Callable[[str], str]):
    expected = read_all(open_checkpoint(write_checkpoint(tmp_path / "as-published", make_model())))
    folder = write_checkpoint(tmp_path / "renamed", make_model())
    change_tensors(folder, lambda tensors: {rename(name): array for name, array in tensors.items()})
    assert_same_tensors(read_all(open_checkpoint(folder)), expected)


def test_bf16_declared_as_raw_integers_reads_the_same(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model(dtype="bfloat16"))
    expected = read_all(open_checkpoint(folder))
    file = folder / "model.safetensors"
    write_tensors(file, read_tensors(file), bits_as="uint16")
    assert_same_tensors(read_all(open_checkpoint(folder)), expected)


def test_integers_that_are_no_weights_are_refused(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model(dtype="bfloat16"))
    file = folder / "model.safetensors"
    tensors = read_tensors(file)
    tensors["ernie.norm.weight"] = np.full_like(tensors["ernie.norm.weight"], 0xFFFF)
    write_tensors(file, tensors, bits_as="uint16")
    with pytest.raises(ConfigError, match="stored as U16"):
        open_checkpoint(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_router_is_oriented_by_its_shape(tmp_path: Path, layout: Layout):
    folder = write_checkpoint(tmp_path, make_model(), layout)
    expected = read_all(open_checkpoint(folder))
    change_tensors(
        folder,
        lambda tensors: {n: array.T if ".gate.weight" in n else array for n, array in tensors.items()},
    )
    assert_same_tensors(read_all(open_checkpoint(folder)), expected)


# what the tensors decide --------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_tying_is_decided_by_the_head_when_the_config_is_silent(tmp_path: Path, tied: bool):
    folder = write_checkpoint(tmp_path, make_model(tied=tied))
    change_config(folder, tie_word_embeddings=...)
    assert open_checkpoint(folder).model.tie_word_embeddings is tied


def test_head_beside_a_tied_config_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = write_checkpoint(tmp_path, make_model(tied=False))
    change_config(folder, tie_word_embeddings=True)
    assert open_checkpoint(folder).model.tie_word_embeddings is False
    assert "lm_head.weight" in caplog.text


def test_missing_head_of_an_untied_config_is_refused(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model(tied=True))
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(ConfigError, match=r"lacks lm_head\.weight"):
        open_checkpoint(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stated", [..., None, 0])
def test_shared_experts_are_counted_when_the_config_omits_them(tmp_path: Path, layout: Layout, stated: Any):
    folder = write_checkpoint(tmp_path, make_model(num_shared_experts=2))
    change_config(folder, moe_num_shared_experts=stated)
    assert open_checkpoint(folder).model.num_shared_experts == 2


def test_stated_but_missing_shared_experts_are_refused(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model(num_shared_experts=0))
    change_config(folder, moe_num_shared_experts=1)
    with pytest.raises(ConfigError, match="shared_experts"):
        open_checkpoint(folder)


# refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_tensors_are_counted_and_named(tmp_path: Path, layout: Layout):
    root = {"paddle": "ernie", "pt": "model"}[layout]
    folder = write_checkpoint(tmp_path, make_model(), layout)
    change_tensors(
        folder,
        lambda tensors: {
            n: a for n, a in tensors.items() if not n.startswith(f"{root}.layers.1.mlp.experts.5.")
        },
    )
    missing = 2 if layout == "paddle" else 3
    with pytest.raises(ConfigError, match=rf"lacks {missing} tensors: layers\.1\.mlp\.experts\.5\.down_proj"):
        open_checkpoint(folder)


def test_unknown_tensor_is_named(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model())
    extra = {"ernie.layers.0.self_attn.q_norm.weight": np.zeros(32, np.float32)}
    change_tensors(folder, lambda tensors: tensors | extra)
    with pytest.raises(ConfigError, match=r"holds the tensor layers\.0\.self_attn\.q_norm\.weight"):
        open_checkpoint(folder)


def test_config_with_another_expert_width_is_refused(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model())
    change_config(folder, moe_intermediate_size=[512, 128])
    with pytest.raises(ConfigError, match=r"experts\.4\.up_gate_proj\.weight has the shape \[128, 512\]"):
        open_checkpoint(folder)


def test_transposed_tensors_are_refused(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model())
    change_tensors(folder, lambda tensors: {name: array.T for name, array in tensors.items()})
    with pytest.raises(ConfigError, match="-Paddle layout"):
        open_checkpoint(folder)


def test_names_that_inference_does_not_use_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = write_checkpoint(tmp_path, make_model())
    extra = {
        "ernie.mtp_block.0.self_attn.o_proj.weight": np.zeros((2, 2), np.float32),
        "ernie.mtp_linear_proj.0.weight": np.zeros((2, 2), np.float32),
        "ernie.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32),
    }
    expected = read_all(open_checkpoint(folder))
    change_tensors(folder, lambda tensors: tensors | extra)
    with caplog.at_level(logging.INFO):
        assert_same_tensors(read_all(open_checkpoint(folder)), expected)
    assert len(caplog.records) == 1 and "ignoring 3 tensors" in caplog.text


def test_layers_that_an_override_removed_are_left_out(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model(num_layers=3))
    model = read_model_config(folder, {"num_hidden_layers": 2})
    with pytest.raises(ConfigError, match=r"layers\.2\."):
        Checkpoint(folder, model)
    names = read_all(Checkpoint(folder, model, is_cut=True))
    assert not any(name.startswith("layers.2.") for name in names)


def test_unsupported_type_is_named(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model())

    def halve(tensors: Tensors) -> Tensors:
        return tensors | {"ernie.norm.weight": tensors["ernie.norm.weight"].astype(np.float16)}

    change_tensors(folder, halve)
    with pytest.raises(ConfigError, match=r"ernie\.norm\.weight is stored as F16"):
        open_checkpoint(folder)


@pytest.mark.parametrize("damage", ["empty", "short", "cut", "garbage", "offsets"])
def test_damaged_file_is_refused_by_name(tmp_path: Path, damage: str):
    folder = write_checkpoint(tmp_path, make_model())
    file = folder / "model.safetensors"
    data = file.read_bytes()
    header = int.from_bytes(data[:8], "little")
    file.write_bytes(
        {
            "empty": b"",
            "short": data[:4],
            "cut": data[:-10],
            "garbage": data[:8] + b"?" * header + data[8 + header :],
            "offsets": data.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1),
        }[damage]
    )
    with pytest.raises(ConfigError, match=r"model\.safetensors.*download it again"):
        open_checkpoint(folder)


def test_folder_of_another_architecture_is_refused(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model())
    change_tensors(folder, lambda tensors: {"wte.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ConfigError, match="neither qkv_proj"):
        open_checkpoint(folder)


def test_folder_without_weights_is_refused(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model())
    (folder / "model.safetensors").rename(folder / "model.pdparams")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        open_checkpoint(folder)


def change_index(folder: Path, name: str, file: str) -> None:
    index = folder / INDEX_NAME
    content = json.loads(index.read_text())
    content["weight_map"][name] = file
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../model-00001-of-00002.safetensors", "outside its folder"),
        ("model-00003-of-00002.safetensors", "cannot be opened"),
        ("model-00001-of-00002.safetensors", "lacks the tensor ernie.nowhere"),
    ],
)
def test_index_that_points_wrong_is_refused(tmp_path: Path, file: str, message: str):
    folder = split_into_shards(write_checkpoint(tmp_path, make_model()), 2)
    change_index(folder, "ernie.nowhere", file)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(folder)


def test_tensor_under_two_names_is_refused(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model())
    change_tensors(folder, lambda tensors: tensors | {"norm.weight": tensors["ernie.norm.weight"]})
    with pytest.raises(ConfigError, match=r"norm\.weight twice"):
        open_checkpoint(folder)

"""Checkpoints whose weights are quantised already: quant_weight, weight_scale, quantization_config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.model_config import effective_quantization, read_model_config
from engine.plan_checkpoint import decide_by_tensors
from engine.plan_weights import weight_bytes
from engine.settle import settle
from tests.checks import assert_close, assert_same_bits
from tests.workers.checkpoints import (
    Tensors,
    arrays_of,
    change_config,
    change_tensors,
    load,
    make_model,
    quantise,
    read_tensors,
    write_checkpoint,
    write_tensors,
)
from workers.device.bfloat16 import bits_from_float32, float32_from_bits
from workers.model.weights import resident_bytes

WINT4 = {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "wint4"}
WINT8 = {"quantization": "wint8"}
UNPERMUTED = {"is_quantized": True, "is_permuted": False, "is_channel_wise": True}


def quantise_checkpoint(
    folder: Path, layout: str, config: dict[str, Any], scale_type: str = "bfloat16"
) -> Path:
    """Every decoder linear becomes integers and a scale per output; int4 is packed along the inputs."""

    def change(tensors: Tensors) -> Tensors:
        changed: Tensors = {}
        for name, values in tensors.items():
            if ".layers." not in name or "_proj.weight" not in name:
                changed[name] = values
                continue
            matrix = float32_from_bits(values)
            matrix = matrix.T if layout == "paddle" else matrix  # [out, in]
            is_int4 = config is WINT4 and ".experts." in name
            integers, scales = quantise(np.ascontiguousarray(matrix), matrix.shape[1], 7 if is_int4 else 127)
            if is_int4:
                integers = ((integers[:, 0::2] & 15) | (integers[:, 1::2] << 4)).astype(np.int8)
            root = name.removesuffix("weight")
            changed[f"{root}quant_weight"] = integers.T if layout == "paddle" else integers
            scales = scales[:, 0]
            changed[f"{root}weight_scale"] = (
                bits_from_float32(scales) if scale_type == "bfloat16" else scales[None].astype(np.float32)
            )
        return changed

    change_config(change_tensors(folder, change), quantization_config=config | UNPERMUTED)
    return folder


def make_checkpoints(tmp_path: Path, layout: Any, config: dict[str, Any], **more: Any) -> tuple[Path, Path]:
    """(bf16, quantised) folders of the same model."""
    model = make_model(dtype="bfloat16", num_shared_experts=1)
    plain = write_checkpoint(tmp_path / "plain", model, layout)
    return plain, quantise_checkpoint(
        write_checkpoint(tmp_path / "offline", model, layout), layout, config, **more
    )


def dequantised(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """fp32 [..., N, K] of a Weight among arrays_of."""
    data, scales = arrays[f"{name}.data"], arrays[f"{name}.scales"]
    if data.dtype == np.int8:
        return data.astype(np.float32) * scales[..., None]
    pairs = np.stack([data & 15, data >> 4], axis=-1).astype(np.int8)
    integers = np.where(pairs > 7, pairs - 16, pairs).reshape(*scales.shape, -1)
    return (integers * scales[..., None]).reshape(*data.shape[:-1], -1).astype(np.float32)


@pytest.mark.parametrize("layout", ["paddle", "pt"])
@pytest.mark.parametrize("scale_type", ["bfloat16", "float32"])
def test_int8_checkpoint_is_what_quantising_at_load_makes(tmp_path: Path, layout: str, scale_type: str):
    plain, offline = make_checkpoints(tmp_path, layout, WINT8, scale_type=scale_type)
    expected, found = arrays_of(load(plain, quantization="wint8")), arrays_of(load(offline))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert_same_bits(found[name], array, name)


@pytest.mark.parametrize("layout", ["paddle", "pt"])
def test_int4_experts_keep_their_channel_scales_in_every_group(tmp_path: Path, layout: str):
    _, offline = make_checkpoints(tmp_path, layout, WINT4)
    weights = load(offline)
    up, down = weights.decoder.layers[1].mlp.pools[0]
    assert (up.kind, up.group, down.group) == ("int4", 64, 64)
    assert weights.decoder.layers[1].qkv.kind == "int8"
    model = make_model(dtype="bfloat16", num_shared_experts=1)
    stored = read_tensors(write_checkpoint(tmp_path / "pt", model, "pt") / "model.safetensors")
    matrix = float32_from_bits(stored["model.layers.1.mlp.experts.2.down_proj.weight"])
    integers, scales = quantise(matrix, matrix.shape[1], 7)
    found = dequantised(arrays_of(weights), "decoder.layers.1.mlp.pools.0.1")[2]
    assert_close(found, integers * scales, 0.0, "expert 2")


@pytest.mark.parametrize("config", [WINT8, WINT4], ids=["wint8", "wint4"])
def test_ranks_cut_integers_and_share_scales(tmp_path: Path, config: dict[str, Any]):
    _, offline = make_checkpoints(tmp_path, "paddle", config)
    whole = arrays_of(load(offline))
    ranks = [arrays_of(load(offline, rank, 2)) for rank in range(2)]
    for name, axis in (("layers.1.o_proj", -1), ("layers.1.mlp.pools.1.1", -1), ("layers.0.mlp.down", -1)):
        parts = [dequantised(rank, f"decoder.{name}") for rank in ranks]
        assert_close(np.concatenate(parts, axis), dequantised(whole, f"decoder.{name}"), 0.0, name)
    up = [np.split(dequantised(rank, "decoder.layers.1.mlp.pools.0.0"), 2, axis=-2) for rank in ranks]
    joined = np.concatenate([up[0][0], up[1][0], up[0][1], up[1][1]], axis=-2)
    assert_close(joined, dequantised(whole, "decoder.layers.1.mlp.pools.0.0"), 0.0, "up_gate")


def test_plan_counts_a_quantised_checkpoint_to_the_byte(tmp_path: Path):
    _, offline = make_checkpoints(tmp_path, "paddle", WINT4)
    model = decide_by_tensors(read_model_config(offline), offline)
    assert model.num_shared_experts == 1
    assert sum(weight_bytes(model, 2, "wint4", is_host=True).values()) == resident_bytes(load(offline, 1, 2))


def test_layers_that_were_left_in_bf16_are_quantised_at_load(tmp_path: Path):
    plain, offline = make_checkpoints(tmp_path, "paddle", WINT8)
    original = read_tensors(plain / "model.safetensors")
    name = "ernie.layers.0.self_attn.qkv_proj.weight"

    def put_back(tensors: Tensors) -> None:
        for suffix in ("quant_weight", "weight_scale"):
            del tensors[name.removesuffix("weight") + suffix]
        tensors[name] = original[name]

    expected = arrays_of(load(offline))
    found = arrays_of(load(change_bytes(offline, put_back)))
    for key, array in expected.items():
        assert_same_bits(found[key], array, key)


def change_bytes(folder: Path, change: Any) -> Path:
    """change_tensors for files that also hold bytes."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    kinds = {"F32": np.float32, "BF16": np.uint16, "I8": np.int8}
    tensors = {
        name: np.frombuffer(
            data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]], kinds[entry["dtype"]]
        ).reshape(entry["shape"])
        for name, entry in json.loads(data[8:start]).items()
        if name != "__metadata__"
    }
    change(tensors)
    write_tensors(file, tensors)
    return folder


# settings -----------------------------------------------------------------------------------------


def test_settings_take_the_format_of_the_checkpoint(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model())
    model = change_config(folder, quantization_config=WINT4 | UNPERMUTED)
    for asked in ("auto", "wint4"):
        config, _ = settle(ServerConfig(quantization=asked), model, folder)  # type: ignore[arg-type]
        assert config.quantization == "wint4"
    for asked in ("wint8", "bfloat16"):
        with pytest.raises(ConfigError, match=f"--quantization {asked} contradicts the checkpoint"):
            settle(ServerConfig(quantization=asked), model, folder)  # type: ignore[arg-type]


def test_settings_without_a_quantised_checkpoint_are_bfloat16_or_what_was_asked(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model())
    model = read_model_config(folder)
    assert effective_quantization(model, "auto") == "bfloat16"
    assert effective_quantization(model, "wint8") == "wint8"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"is_permuted": True}, "permuted for one GPU's kernels"),
        ({"is_permuted": None}, "permuted for one GPU's kernels"),
        ({"has_zero_point": True}, "not symmetric per channel"),
        ({"is_channel_wise": False}, "not symmetric per channel"),
        ({"quantization": "wint2"}, "has wint2; Octet reads wint8, wint4"),
        (
            {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "w4a8"},
            "has w4a8, wint8",
        ),
        ({**WINT4, "image_moe_quant_type": "wint8"}, "text and vision experts differently"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(tmp_path: Path, changes: dict[str, Any], sentence: str):
    folder = write_checkpoint(tmp_path, make_model())
    change_config(folder, quantization_config=WINT8 | UNPERMUTED | changes)
    with pytest.raises(ConfigError, match=sentence):
        load(folder)


def test_quantised_tensors_need_their_config_scales_and_shapes(tmp_path: Path):
    _, offline = make_checkpoints(tmp_path / "a", "paddle", WINT8)
    change_config(offline, quantization_config=...)
    with pytest.raises(ConfigError, match=r"lacks|quant_weight"):
        load(offline)

    _, offline = make_checkpoints(tmp_path / "b", "paddle", WINT8)
    scale = "ernie.layers.0.self_attn.o_proj.weight_scale"
    with pytest.raises(ConfigError, match=r"lacks the tensor layers\.0\.self_attn\.o_proj\.weight_scale"):
        load(change_bytes(offline, lambda tensors: tensors.pop(scale)))

    _, offline = make_checkpoints(tmp_path / "c", "paddle", WINT8)
    change_config(offline, quantization_config=WINT4 | UNPERMUTED)  # says int4, holds int8
    with pytest.raises(ConfigError, match=r"experts.*quant_weight has the shape"):
        load(offline)

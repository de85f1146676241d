"""Which linear gets which format, and which sizes fit no format."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.model_config import read_model_config
from tests.workers.checkpoints import arrays_of, load, make_model, write_checkpoint
from workers.checkpoint_inventory import Role, model_tensors
from workers.parallel import share_of
from workers.quant import Format, activation_dtype, format_of
from workers.shards import part_of

PRESETS = Path(__file__).resolve().parents[2] / "models" / "presets"

# bfloat16, wint8, wint4 in a model with experts, wint4 in a dense model
TABLE = {
    Role.VOCAB: ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
    Role.QKV: ("bfloat16", "int8", "int8", "int4"),
    Role.ATTENTION_OUT: ("bfloat16", "int8", "int8", "int4"),
    Role.DENSE_UP: ("bfloat16", "int8", "int8", "int4"),
    Role.DENSE_DOWN: ("bfloat16", "int8", "int8", "int4"),
    Role.SHARED_UP: ("bfloat16", "int8", "int8", "int4"),
    Role.SHARED_DOWN: ("bfloat16", "int8", "int8", "int4"),
    Role.EXPERT_UP: ("bfloat16", "int8", "int4", "int4"),
    Role.EXPERT_DOWN: ("bfloat16", "int8", "int4", "int4"),
    Role.VISION: ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
}


@pytest.mark.parametrize("role", TABLE)
def test_formats_follow_the_table(role: Role):
    modes = (("bfloat16", True), ("wint8", True), ("wint4", True), ("wint4", False))
    kinds = [format_of(role, 128, mode, "bfloat16", moe).kind for mode, moe in modes]  # type: ignore[arg-type]
    assert tuple(kinds) == TABLE[role]


@pytest.mark.parametrize(
    ("inputs", "group"), [(8192, 64), (448, 64), (192, 64), (64, 64), (96, 32), (32, 32)]
)
def test_int4_groups_are_64_wide_where_they_divide(inputs: int, group: int):
    assert format_of(Role.EXPERT_DOWN, inputs, "wint4", "bfloat16", True) == Format("int4", group)


def test_width_that_no_group_divides_is_refused():
    with pytest.raises(ConfigError, match="routed experts' down_proj has 48; use wint8 or a smaller"):
        format_of(Role.EXPERT_DOWN, 48, "wint4", "bfloat16", True)


@pytest.mark.parametrize(("preset", "world"), [("ernie-4.5-vl-424b-a47b", 8), ("ernie-4.5-vl-28b-a3b", 4)])
def test_published_models_have_groups_of_64_on_every_rank(preset: str, world: int):
    model = msgspec.structs.replace(read_model_config(PRESETS / f"{preset}.json"), num_layers=4)
    share = share_of(model, world - 1, world)
    experts = [t for t in model_tensors(model) if t.role in (Role.EXPERT_UP, Role.EXPERT_DOWN)]
    formats = {
        format_of(t.role, part_of(t, model, share).shape[1], "wint4", "bfloat16", True) for t in experts
    }
    assert formats == {Format("int4", 64)}


def test_activations_follow_the_checkpoint_unless_told_otherwise():
    model = read_model_config(PRESETS / "ernie-4.5-0.3b.json")
    assert activation_dtype(ServerConfig(), model) == "bfloat16"
    assert activation_dtype(ServerConfig(dtype="float32"), model) == "float32"


@pytest.mark.parametrize(
    ("mode", "expert", "other"),
    [
        ("bfloat16", "bfloat16", "bfloat16"),
        ("wint8", "int8", "int8"),
        ("wint4", "int4", "int8"),
        ("wint4-all", "int4", "int4"),
    ],
)
def test_loaded_weights_have_the_formats_of_the_table(tmp_path: Path, mode: str, expert: str, other: str):
    folder = write_checkpoint(tmp_path, make_model(dtype="bfloat16", num_shared_experts=1))
    weights = load(folder, quantization=mode)
    dense, moe = (layer.mlp for layer in weights.decoder.layers)
    attention = [weights.decoder.layers[0].qkv, weights.decoder.layers[0].o_proj]
    assert {w.kind for pool in moe.pools for w in pool} == {expert}
    assert {w.kind for w in [*attention, dense.up_gate, dense.down, moe.shared.up_gate, moe.shared.down]} == {
        other
    }
    assert weights.decoder.lm_head.kind == other
    plain = [weights.vision.patch_embed, weights.resampler.mlp]
    assert {w.kind for w in plain} == {"bfloat16"}
    assert str(moe.router.dtype).endswith("float32")
    assert all(array.size for array in arrays_of(weights).values())

"""What each rank holds after loading: the right slice, in the right format, whatever the layout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.model_config import read_model_config
from models.tiny import write_tiny_checkpoint
from models.tiny_config import Layout
from tests.checks import assert_close, assert_same_bits
from tests.workers.checkpoints import (
    arrays_of,
    change_config,
    change_tensors,
    load,
    make_model,
    quantise,
    read_tensors,
    write_checkpoint,
)
from workers.device.bfloat16 import float32_from_bits
from workers.device.paddle import PaddleCpu
from workers.loader import load_weights

ROOT = Path(__file__).resolve().parents[2]
WORLDS = [1, 2, 4, 8]


def assert_same_weights(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, values in actual.items():
        assert_same_bits(values, expected[name], name)


# layouts and formats ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bfloat16", "wint8", "wint4", "wint4-all"])
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (3, 4)])
def test_both_layouts_load_to_the_same_bits(tmp_path: Path, mode: str, rank: int, world: int):
    layouts: list[Layout] = ["paddle", "pt"]
    model = make_model(dtype="bfloat16", num_shared_experts=1)
    paddle, pt = (
        arrays_of(load(write_checkpoint(tmp_path / layout, model, layout), rank, world, quantization=mode))
        for layout in layouts
    )
    assert_same_weights(paddle, pt)


def test_quantised_weights_are_the_rounded_slice_of_the_checkpoint(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model(dtype="bfloat16"), "pt")
    stored = read_tensors(folder / "model.safetensors")
    weights = load(folder, rank=1, world=2, quantization="wint4")
    arrays = arrays_of(weights.decoder.layers[1])

    down = float32_from_bits(stored["model.layers.1.mlp.experts.6.down_proj.weight"])[:, 128:]
    integers, scales = quantise(down, 64, 7)
    packed = arrays["mlp.pools.1.1.data"][2]  # expert 6 is the third of the vision pool
    assert_same_bits((packed & 15).astype(np.int8), integers[:, 0::2] & 15, "even columns")
    assert_same_bits((packed >> 4).astype(np.int8), integers[:, 1::2] & 15, "odd columns")
    assert_same_bits(arrays["mlp.pools.1.1.scales"][2], scales, "int4 scales")

    out = float32_from_bits(stored["model.layers.1.self_attn.o_proj.weight"])[:, 64:]
    integers, scales = quantise(out, 64, 127)  # one group: the scale of the local row
    assert_same_bits(arrays["o_proj.data"], integers, "int8")
    assert_same_bits(arrays["o_proj.scales"], scales[:, 0], "int8 scales")


@pytest.mark.parametrize(("stored", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_dtype_flag_overrides_the_checkpoint(tmp_path: Path, stored: str, wanted: str):
    folder = write_checkpoint(tmp_path, make_model(dtype=stored))
    given, asked = load(folder), load(folder, dtype=wanted)
    assert str(asked.decoder.embed_tokens.dtype).endswith(wanted)
    assert asked.decoder.layers[0].qkv.kind == wanted
    tolerance = 0.0 if stored == "bfloat16" else 2.0**-8  # only narrowing rounds
    for name, values in arrays_of(given).items():
        assert_close(arrays_of(asked)[name], values, tolerance * float(np.abs(values).max()), name)


# shares -------------------------------------------------------------------------------------------


def join_ranks(
    ranks: list[dict[str, np.ndarray]], head_dim: int, kv_copies: int = 1
) -> dict[str, np.ndarray]:
    """Rebuild the whole tensors from every rank's share."""
    whole = {}
    for name in ranks[0]:
        parts = [rank[name] for rank in ranks]
        if name.endswith("qkv.data") and "vision" not in name:
            queries = ranks[0][name.replace("qkv", "o_proj")].shape[1]
            blocks = [np.split(p, [queries, (len(p) + queries) // 2]) for p in parts]
            whole[name] = np.concatenate(
                [b[0] for b in blocks]
                + [b[1] for b in blocks[::kv_copies]]
                + [b[2] for b in blocks[::kv_copies]]
            )
        elif "up_gate" in name or (".pools." in name and name.endswith("0.data")):
            halves = [np.split(part, 2, axis=-2) for part in parts]
            whole[name] = np.concatenate([h[0] for h in halves] + [h[1] for h in halves], axis=-2)
        elif "o_proj" in name or "down" in name or (".pools." in name and name.endswith("1.data")):
            whole[name] = np.concatenate(parts, axis=-1)
        elif "embed_tokens" in name or "lm_head" in name:
            whole[name] = np.concatenate(parts)
        else:
            for part in parts[1:]:
                assert_same_bits(part, parts[0], f"{name} is replicated")
            whole[name] = parts[0]
    return whole


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_shares_of_all_ranks_make_up_the_model(tmp_path: Path, world: int, kv_heads: int):
    folder = write_checkpoint(tmp_path, make_model(num_kv_heads=kv_heads, num_shared_experts=1))
    ranks = [arrays_of(load(folder, rank, world)) for rank in range(world)]
    head_dim = make_model().head_dim
    assert ranks[0]["decoder.layers.0.qkv.data"].shape == (
        (8 // world + 2 * max(kv_heads // world, 1)) * head_dim,
        128,
    )
    assert ranks[0]["decoder.layers.1.mlp.pools.1.0.data"].shape == (4, 2 * 256 // world, 128)
    whole = join_ranks(ranks, head_dim, max(world // kv_heads, 1))
    assert_same_weights(whole, arrays_of(load(folder)))


def test_rows_that_pad_the_vocabulary_are_zero(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model(vocab_size=317))
    whole = arrays_of(load(folder))["decoder.lm_head.data"]
    ranks = [arrays_of(load(folder, rank, 8))["decoder.lm_head.data"] for rank in range(8)]
    joined = np.concatenate(ranks)
    assert joined.shape == (320, 128)
    assert_same_bits(joined[:317], whole)
    assert not joined[317:].any()


def test_rank_beyond_the_vocabulary_holds_only_padding(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model(vocab_size=305))
    weights = load(folder, 7, 8)  # 39 rows per rank: rank 7 starts at 273 and has 32 real rows
    rows = arrays_of(weights)["decoder.embed_tokens"]
    assert rows[:32].any(axis=1).all() and not rows[32:].any()


def test_tied_head_shares_the_embedding_memory(tmp_path: Path):
    weights = load(write_checkpoint(tmp_path, make_model(tied=True)))
    assert weights.decoder.lm_head.data is weights.decoder.embed_tokens


def test_ranks_that_do_not_divide_the_model_are_refused(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model())
    with pytest.raises(ConfigError, match="tensor-parallel-size 3"):
        load(folder, 0, 3)


def test_group_that_does_not_fit_a_rank_is_refused(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model(expert_widths=(512, 128)))
    with pytest.raises(ConfigError, match="has 16; use wint8"):
        load(folder, 0, 8, quantization="wint4")


# router and correction bias -----------------------------------------------------------------------


def test_routers_are_stacked_by_pool_in_fp32(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model(dtype="bfloat16"))
    stored = read_tensors(folder / "model.safetensors")
    moe = load(folder).decoder.layers[1].mlp
    router, bias = PaddleCpu().download(moe.router), PaddleCpu().download(moe.bias)
    root = "ernie.layers.1.mlp"
    assert_same_bits(router[0], np.ascontiguousarray(stored[f"{root}.gate.weight"].T), "text router")
    assert_same_bits(router[1], np.ascontiguousarray(stored[f"{root}.gate.weight_1"].T), "vision router")
    assert_same_bits(bias, stored[f"{root}.moe_statics.e_score_correction_bias"], "bias")
    assert bias.any()


def test_correction_bias_is_zero_when_absent_or_switched_off(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "off", make_model())
    change_config(folder, moe_use_aux_free=False)
    absent = change_tensors(
        write_checkpoint(tmp_path / "absent", make_model()),
        lambda tensors: {name: a for name, a in tensors.items() if "e_score" not in name},
    )
    for checkpoint in (folder, absent):
        assert not arrays_of(load(checkpoint))["decoder.layers.1.mlp.bias"].any()


# progress, memory ---------------------------------------------------------------------------------


def test_progress_rises_to_the_bytes_this_rank_reads(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model(dtype="bfloat16"))
    model = read_model_config(folder)

    def bytes_read(world: int) -> int:
        loaded: list[int] = []
        totals: set[int] = set()

        def on_progress(bytes_loaded: int, bytes_total: int) -> None:
            loaded.append(bytes_loaded)
            totals.add(bytes_total)

        load_weights(ServerConfig(model=str(folder)), model, PaddleCpu(), 0, world, on_progress)
        assert loaded == sorted(loaded) and totals == {loaded[-1]}
        return loaded[-1]

    stored = sum(array.nbytes for array in read_tensors(folder / "model.safetensors").values())
    assert bytes_read(world=1) == stored
    assert bytes_read(world=4) < stored / 2


_MEASURE = """
import sys
from pathlib import Path
from tests.workers.checkpoints import load
from workers.model.weights import resident_bytes

def read(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
    return int(line.split()[1]) << 10

load(Path(sys.argv[2]), quantization="wint4")  # libraries, thread pools and allocators are up
before = read("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
weights = load(Path(sys.argv[1]), quantization="wint4")
print(read("VmHWM") - before, resident_bytes(weights))
"""


def test_host_memory_stays_near_the_final_weights(tmp_path: Path):
    warm = write_checkpoint(tmp_path / "warm", make_model(dtype="bfloat16"))
    large = make_model(
        dtype="bfloat16", hidden_size=512, num_layers=4, num_experts=16, expert_widths=(1024, 512)
    )
    folder = write_checkpoint(tmp_path / "large", large)
    command = [sys.executable, "-W", "ignore", "-c", _MEASURE, str(folder), str(warm)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    growth, final = map(int, done.stdout.split())
    on_disk = (folder / "model.safetensors").stat().st_size
    # One matrix in bf16 and its quantised copy are small change; the whole checkpoint would not be.
    assert growth < final + (48 << 20) < on_disk, f"grew by {growth}, weights {final}, checkpoint {on_disk}"


# dummy weights ------------------------------------------------------------------------------------


def load_dummy(folder: Path, rank: int = 0, world: int = 1, **settings: object) -> dict[str, np.ndarray]:
    return arrays_of(load(folder, rank, world, load_format="dummy", **settings))


def make_config_folder(tmp_path: Path, **changes: object) -> Path:
    folder = write_checkpoint(tmp_path, make_model(num_shared_experts=1, **changes))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("mode", ["bfloat16", "wint8", "wint4", "wint4-all"])
def test_dummy_weights_have_the_shapes_of_loaded_ones(tmp_path: Path, mode: str):
    folder = write_checkpoint(tmp_path, make_model(dtype="bfloat16", num_shared_experts=1))
    real = arrays_of(load(folder, 1, 2, quantization=mode))
    dummy = load_dummy(folder, 1, 2, quantization=mode)
    assert {name: (a.shape, a.dtype) for name, a in dummy.items()} == {
        name: (a.shape, a.dtype) for name, a in real.items()
    }


@pytest.mark.parametrize("world", [2, 8])
def test_dummy_weights_are_the_same_model_for_every_number_of_ranks(tmp_path: Path, world: int):
    folder = make_config_folder(tmp_path)
    ranks = [load_dummy(folder, rank, world) for rank in range(world)]
    assert_same_weights(join_ranks(ranks, make_model().head_dim), load_dummy(folder))


def test_dummy_weights_differ_between_tensors_and_keep_activations_finite(tmp_path: Path):
    folder = make_config_folder(tmp_path)
    arrays = load_dummy(folder)
    experts = arrays["decoder.layers.1.mlp.pools.0.0.data"]
    assert not np.array_equal(experts[0], experts[1])
    routers = arrays["decoder.layers.1.mlp.router"]
    assert not np.array_equal(routers[0], routers[1])
    assert (arrays["decoder.norm"] == 1).all() and (arrays["vision.ln_w"] == 1).all()
    assert not arrays["vision.ln_b"].any()
    for name, values in arrays.items():
        if values.ndim >= 2 and values.any():
            gain = float(values.std()) * values.shape[-1] ** 0.5
            assert 0.8 < gain < 1.2, f"{name} scales its input by {gain}"


def test_dummy_int4_uses_the_symmetric_range(tmp_path: Path):
    arrays = load_dummy(make_config_folder(tmp_path), quantization="wint4")
    packed = arrays["decoder.layers.1.mlp.pools.0.0.data"]
    nibbles = np.concatenate([packed & 15, packed >> 4]).astype(np.int8)
    assert set(np.unique(np.where(nibbles > 7, nibbles - 16, nibbles))) == set(range(-7, 8))


def test_embedded_checkpoint_loads_on_eight_ranks_in_groups_of_64_and_32(tmp_path: Path):
    folder = write_tiny_checkpoint(tmp_path)
    mlp = load(folder, 5, 8, quantization="wint4").decoder.layers[1].mlp
    assert [[weight.group for weight in pool] for pool in mlp.pools] == [[64, 64], [64, 32]]

"""What the memory planner says about published models and known machines, and what a server makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.model_config import ModelConfig, read_model_config
from engine.model_source import preset_file
from engine.plan import Plan, alternatives, make_plan
from engine.plan_checkpoint import decide_by_tensors
from engine.plan_command import main
from engine.plan_machine import Machine, named_machine, this_host
from engine.plan_report import as_json, refusal, table
from engine.plan_server import plan_server
from engine.plan_weights import kv_bytes_per_token, weight_bytes
from engine.settle import settle
from models.tiny_config import golden_tied_model
from tests.workers.checkpoints import make_model, write_checkpoint

GIB = 1 << 30
VL_424B, VL_28B, TEXT_21B = "ernie-4.5-vl-424b-a47b", "ernie-4.5-vl-28b-a3b", "ernie-4.5-21b-a3b"


def model_of(preset: str) -> ModelConfig:
    return decide_by_tensors(read_model_config(preset_file(preset)), preset_file(preset))


def plan_of(preset: str, device: str | Machine, world: int = 1, **settings: Any) -> Plan:
    """The plan of a preset on a machine, settled as a server would."""
    config = ServerConfig(model=preset, tensor_parallel_size=world, **settings)
    model = model_of(preset)
    settled, _ = settle(config, model, preset_file(preset))
    return make_plan(settled, model, named_machine(device) if isinstance(device, str) else device)


# weights ------------------------------------------------------------------------------------------

# Model specification 1.7: GiB of one TP8 rank of the 424B, scales apart.
RANK_424B = {
    "embedding and head": (0.394, 0.394, 0.394),
    "qkv": (1.055, 0.527, 0.527),
    "o_proj": (0.844, 0.422, 0.422),
    "dense FFN": (0.492, 0.246, 0.246),
    "text experts": (66.938, 33.469, 16.734),
    "vision experts": (28.688, 14.344, 7.172),
    "routers": (0.199, 0.199, 0.199),
    "vision tower": (1.174, 1.174, 1.174),
    "resampler": (0.322, 0.322, 0.322),
    "total": (100.11, 51.10, 27.19),
}


@pytest.mark.parametrize(("column", "quantization"), list(enumerate(["bfloat16", "wint8", "wint4"])))
def test_rank_of_the_424b_has_the_bytes_of_the_specification(column: int, quantization: Any):
    found = weight_bytes(model_of(VL_424B), 8, quantization)
    found["embedding and head"] = found.pop("embedding") + found.pop("head")
    scales = found.pop("scales", 0)
    found["total"] = sum(found.values())
    del found["norms"]
    assert {name: round(count / GIB, 2) for name, count in found.items()} == {
        name: round(row[column], 2) for name, row in RANK_424B.items()
    }
    expected_scales = {"bfloat16": 0.0, "wint8": 0.02, "wint4": 1.5}  # per channel; of groups of 64 inputs
    assert scales / GIB == pytest.approx(expected_scales[quantization], abs=0.15)


@pytest.mark.parametrize(
    ("preset", "quantization", "gib"),
    [
        (VL_424B, "bfloat16", 789.0),
        (VL_424B, "wint4", 205.7),
        (VL_28B, "bfloat16", 54.78),
        (VL_28B, "wint8", 28.37),
        (VL_28B, "wint4", 15.72),
        ("ernie-4.5-300b-a47b", "wint8", 280.6),
        (TEXT_21B, "wint4", 11.09),
        ("ernie-4.5-0.3b", "bfloat16", 0.67),
    ],
)
def test_whole_model_has_the_bytes_of_the_specification(preset: str, quantization: Any, gib: float):
    found = weight_bytes(model_of(preset), 1, quantization)
    assert (sum(found.values()) - found.get("scales", 0)) / GIB == pytest.approx(gib, rel=3e-3)


def test_token_has_the_kv_bytes_of_the_specification():
    assert kv_bytes_per_token(model_of(VL_424B), 1) == 221_184
    assert kv_bytes_per_token(model_of(VL_424B), 8) == 27_648
    assert kv_bytes_per_token(model_of(VL_424B), 16) == 27_648  # kv heads are copied, not cut further
    assert kv_bytes_per_token(model_of(VL_28B), 1) == 57_344
    assert kv_bytes_per_token(model_of(VL_28B), 1, "int8") == 57_344 // 2 + 28 * 2 * 4 * 2  # scales of bf16


# what fits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "fitting"),
    [
        ("h20-144g", {"wint4", "wint8", "bfloat16"}),
        ("h200", {"wint4", "wint8", "bfloat16"}),
        ("a100-80g", {"wint4", "wint8"}),
        ("h800-80g", {"wint4", "wint8"}),
        ("h20-96g", {"wint4", "wint8"}),
        ("l20-48g", {"wint4"}),
    ],
)
def test_424b_on_eight_gpus_fits_as_the_guide_says(device: str, fitting: set[str]):
    # 32768 is the context of the guide's command; its l20 row is ours.
    plans = {
        quantization: plan_of(VL_424B, device, 8, quantization=quantization, max_model_len=32768)
        for quantization in ("wint4", "wint8", "bfloat16")
    }
    assert {name for name, plan in plans.items() if plan.fits} == fitting


def test_what_does_not_fit_names_what_would():
    config = ServerConfig(
        model=VL_424B,
        quantization="bfloat16",
        tensor_parallel_size=8,
        max_model_len=32768,
        max_num_batched_tokens=2048,
    )
    others = list(alternatives(config, model_of(VL_424B), named_machine("a100-80g")))
    assert [(plan.world, plan.quantization) for plan in others[:2]] == [(8, "wint8"), (8, "wint4")]
    text = table(make_plan(config, model_of(VL_424B), named_machine("a100-80g")), others)
    assert "does not fit: a rank lacks" in text and "--quant wint8 --tp 8" in text


def test_image_cache_takes_its_room_from_the_kv_cache_of_models_that_see():
    for preset, expected in ((VL_28B, GIB), (TEXT_21B, 0)):
        without, with_cache = (plan_of(preset, "h200", image_cache=size) for size in (0, GIB))
        assert without.room - with_cache.room == expected, preset


def test_swap_space_takes_its_room_from_the_kv_cache_only_where_it_is_the_same_memory():
    for machine, expected in (("h200", 0), ("cpu-64g", GIB)):
        without, with_swap = (
            plan_of(TEXT_21B, machine, quantization="wint4", swap_space=size) for size in (0, GIB)
        )
        assert without.room - with_swap.room == expected, machine


def test_ranks_on_one_host_share_its_memory():
    one, four = (plan_of(TEXT_21B, "cpu-64g", world, quantization="wint4") for world in (1, 4))
    assert four.usable == one.usable // 4
    assert four.room * 4 < one.room  # each rank is a process, and holds routers and norms whole


def test_context_that_does_not_fit_is_shortened_only_when_nobody_asked_for_it():
    machine = named_machine("cpu-24g")
    model = model_of(VL_28B)
    asked = ServerConfig(model=str(preset_file(VL_28B)), quantization="wint4", max_model_len=131072)
    settled, _ = settle(asked, model, preset_file(VL_28B))
    planned, notes = plan_server(settled, model, machine, asked_context=0)
    assert 8192 <= planned.max_model_len < 131072
    assert planned.max_model_len <= planned.kv_cache_memory // kv_bytes_per_token(model, 1)
    assert f"serving {planned.max_model_len}" in notes[0]
    with pytest.raises(ConfigError, match=r"one sequence of 131072 tokens takes 7\.00 GiB"):
        plan_server(settled, model, machine, asked_context=131072)


def test_server_that_cannot_hold_its_weights_is_refused_with_the_table():
    config = ServerConfig(model=str(preset_file(VL_28B)), quantization="wint4")
    model = model_of(VL_28B)
    settled, _ = settle(config, model, preset_file(VL_28B))
    with pytest.raises(ConfigError, match="a rank lacks") as refused:
        plan_server(settled, model, named_machine("cpu-16g"), asked_context=0)
    assert "text experts" in str(refused.value)


@pytest.mark.parametrize(("given", "blocks"), [(0, 512), (3 * GIB, 877)])
def test_kv_cache_on_a_host_is_what_sequences_can_use_or_what_was_asked(given: int, blocks: int):
    """28B: a block of 64 tokens is 3.5 MiB."""
    plan = plan_of(
        VL_28B, "cpu-64g", quantization="wint4", max_model_len=8192, max_num_seqs=4, kv_cache_memory=given
    )
    assert plan.num_blocks == blocks
    assert plan.fits


@pytest.mark.parametrize(
    ("device", "given"), [("cpu-64g", 3 * GIB), ("h200", 0)], ids=["what was asked", "what is left"]
)
def test_int8_kv_cache_holds_nearly_twice_the_tokens(device: str, given: int):
    """Of heads of 128 values, with 2 bytes of scale each: 256 bytes become 130."""
    plain, int8 = (
        plan_of(VL_28B, device, quantization="wint4", kv_cache_memory=given, max_model_len=8192, **changes)
        for changes in ({}, {"kv_cache_dtype": "int8"})
    )
    assert int8.kv_tokens / plain.kv_tokens == pytest.approx(256 / 130, rel=0.01)
    assert "fits: int8 KV cache of" in table(int8) and "int8" not in table(plain)
    assert [as_json(plan)["kv_cache"]["dtype"] for plan in (plain, int8)] == ["bfloat16", "int8"]


def test_bfloat16_kv_cache_beside_float32_activations_is_refused():
    plan_of(VL_28B, "h200", kv_cache_dtype="bfloat16")
    with pytest.raises(ConfigError, match="leave it out, take int8, or give --dtype bfloat16"):
        plan_of(VL_28B, "cpu-64g", dtype="float32", kv_cache_dtype="bfloat16")
    assert plan_of(VL_28B, "cpu-64g", dtype="float32", kv_cache_dtype="int8").kv_dtype == "int8"


def test_kv_cache_larger_than_the_room_is_refused():
    plan = plan_of(VL_28B, "cpu-24g", quantization="wint4", max_model_len=8192, kv_cache_memory=64 * GIB)
    assert not plan.fits
    assert "--kv-cache-memory asks for 64.00 GiB per rank" in refusal(plan)


def test_utilization_bounds_a_gpu_and_memory_in_use_bounds_both():
    def room(available: int, share: float) -> int:
        machine = Machine("gpu", 80 * GIB, is_host=False, available=available * GIB)
        return plan_of(TEXT_21B, machine, quantization="wint4", gpu_memory_utilization=share).usable

    assert room(80, 0.5) == 40 * GIB
    assert room(30, 0.5) == 30 * GIB


def test_smaller_pictures_leave_more_room():
    settings = {"quantization": "wint4", "max_model_len": 8192}
    large = plan_of(VL_28B, "cpu-24g", **settings)
    small = plan_of(VL_28B, "cpu-24g", mm_processor_kwargs={"image_max_pixels": 1_000_000}, **settings)
    assert small.vision < large.vision / 4
    assert plan_of(TEXT_21B, "cpu-24g", **settings).vision == 0


def test_this_machine_has_memory_and_uses_some():
    machine = this_host()
    assert machine.is_host
    assert 0 < machine.available < machine.memory


def test_unknown_device_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"a100-80g.*cpu-<GiB>g"):
        named_machine("tpu-9")


# tensors decide -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["paddle", "pt"])
def test_tied_head_and_shared_experts_are_found_in_the_checkpoint(tmp_path: Path, layout: Any):
    folder = write_checkpoint(tmp_path, golden_tied_model(), layout)
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    for key in ("tie_word_embeddings", "moe_num_shared_experts"):
        raw.pop(key, None)
    file.write_text(json.dumps(raw))
    decided = decide_by_tensors(read_model_config(folder), folder)
    assert decided.tie_word_embeddings is True
    assert decided.num_shared_experts == 2


def test_what_a_damaged_checkpoint_cannot_tell_comes_from_the_config(tmp_path: Path):
    folder = write_checkpoint(tmp_path, make_model())
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    model = read_model_config(folder)
    assert decide_by_tensors(model, folder) == msgspec.structs.replace(
        model, tie_word_embeddings=bool(model.tie_word_embeddings), num_shared_experts=0
    )


# the command --------------------------------------------------------------------------------------


def test_command_leaves_with_0_when_it_fits_and_1_when_not(capsys: pytest.CaptureFixture[str]):
    line = ["--model", VL_424B, "--tp", "8", "--device", "a100-80g", "--max-num-seqs", "4"]
    assert main([*line, "--quant", "wint4"]) == 0
    assert "fits: KV cache of" in capsys.readouterr().out
    assert main([*line, "--quant", "bf16"]) == 1
    assert "would fit: --quant wint8 --tp 8" in capsys.readouterr().out


def test_command_prints_json_that_adds_up(capsys: pytest.CaptureFixture[str]):
    assert main(["--model", VL_28B, "--device=cpu-64g", "--quant", "wint8", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    rank = said["bytes_per_rank"]
    assert rank["weights"] == sum(rank["weights_by_component"].values())
    parts = sum(rank[name] for name in ("process", "weights", "step", "vision", "kv_cache"))
    assert said["fits"] and parts <= rank["usable"]
    assert said["kv_cache"]["tokens"] == said["kv_cache"]["blocks"] * said["kv_cache"]["block_size"]
    assert said == as_json(plan_of(VL_28B, "cpu-64g", quantization="wint8"))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["--tp", "8"], "num_attention_heads = 20; sizes that do: 1, 2, 4"),
        (["--device", "toaster"], "--device toaster is not known"),
        (["--device"], "--device needs a value"),
        (["--quant", "wint5"], "did you mean wint"),
    ],
)
def test_command_refuses_wrong_flags_in_one_sentence(
    line: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["--model", VL_28B, *line]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1


def test_command_runs_without_any_tensor_library():
    code = (
        "import sys; from engine.plan_command import main; main(sys.argv[1:]); "
        "assert not {'numpy', 'paddle'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, "--model", VL_28B], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()

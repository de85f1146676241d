"""Every published spelling of a configuration gives the same model, and what cannot be served is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.model_config import (
    ModelConfig,
    check_tensor_parallel,
    parse_model_config,
    read_model_config,
)
from engine.parameters import active_parameters, parameter_counts, total_parameters

PRESETS = Path(__file__).resolve().parents[2] / "models" / "presets"


def make_paddle(**changes: Any) -> dict[str, Any]:
    raw = {
        "model_type": "ernie4_5_moe_vl",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 512,
        "vocab_size": 103424,
        "moe_num_experts": [8, 8],
        "moe_intermediate_size": [64, 32],
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": [1, 1],
        "moe_layer_end_index": [3, 3],
        "moe_layer_interval": 1,
        "freq_allocation": 4,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "vision_config": {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 4},
    }
    return without_none({**raw, **changes})


def make_transformers(**changes: Any) -> dict[str, Any]:
    """The same model as make_paddle in transformers' nested spelling."""
    text = {
        "model_type": "ernie4_5_vl_moe_text",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 512,
        "vocab_size": 103424,
        "moe_num_experts": 8,
        "moe_intermediate_size": [64, 32],
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [6, 6, 4]},
        "tie_word_embeddings": False,
        "eos_token_id": [2],
        "dtype": "bfloat16",
    }
    return {
        "model_type": "ernie4_5_vl_moe",
        "text_config": without_none({**text, **changes}),
        "vision_config": {"depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 256},
        "image_token_id": 100295,
        "video_token_id": 103367,
        "tie_word_embeddings": False,
    }


def make_text(**changes: Any) -> dict[str, Any]:
    raw = make_paddle(
        model_type="ernie4_5_moe", moe_num_experts=8, moe_intermediate_size=64, moe_layer_start_index=1
    )
    raw["moe_layer_end_index"] = -1
    return without_none({**raw, **changes})


def without_none(raw: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if value is not ...}


def read_preset(name: str, **overrides: Any) -> ModelConfig:
    return read_model_config(PRESETS / f"{name}.json", overrides)


# spellings ----------------------------------------------------------------------------------------


def test_transformers_spelling_gives_the_same_model_as_paddle_spelling():
    assert parse_model_config(make_transformers()) == parse_model_config(make_paddle())


def test_remote_code_spelling_with_scalars_gives_the_same_model_as_lists():
    scalars = make_paddle(moe_num_experts=8, moe_layer_start_index=1, moe_layer_end_index=3, auto_map={})
    assert parse_model_config(scalars) == parse_model_config(make_paddle())


@pytest.mark.parametrize("end", [-1, 3, 99, [3, 3], [5, 4], [-1, 4], ..., None])
def test_end_index_beyond_the_last_layer_means_the_last_layer(end: Any):
    assert parse_model_config(make_paddle(moe_layer_end_index=end)).moe_layers == (1, 2, 3)


def test_layer_interval_picks_every_second_layer():
    assert parse_model_config(make_paddle(moe_layer_interval=2)).moe_layers == (1, 3)


@pytest.mark.parametrize("value", [None, ...])
def test_unstated_shared_experts_and_tying_are_left_to_the_tensors(value: Any):
    config = parse_model_config(make_paddle(moe_num_shared_experts=value, tie_word_embeddings=value))
    assert config.num_shared_experts is None
    assert config.tie_word_embeddings is None


def test_tying_is_left_to_the_tensors_when_both_levels_disagree():
    raw = make_transformers()
    raw["tie_word_embeddings"] = True
    assert parse_model_config(raw).tie_word_embeddings is None


def test_head_dim_falls_back_to_hidden_over_heads_and_is_honoured_when_given():
    assert parse_model_config(make_paddle()).head_dim == 32
    config = parse_model_config(make_paddle(head_dim=64, freq_allocation=8))
    assert config.head_dim == 64
    assert config.qkv_size == (8 + 2 * 4) * 64


def test_rope_split_is_read_from_either_key():
    by_section = make_paddle(
        freq_allocation=..., rope_scaling={"type": "default", "mrope_section": [6, 6, 4]}
    )
    assert parse_model_config(by_section).time_frequencies == 4
    assert read_preset("ernie-4.5-vl-424b-a47b").time_frequencies == 20


def test_text_model_has_one_pool_no_vision_and_no_vision_token():
    config = parse_model_config(make_text())
    assert (config.family, config.num_pools, config.vision) == ("text", 1, None)
    assert config.moe_layers == (1, 2, 3)
    assert config.time_frequencies == 0
    assert config.image_patch_id == config.vocab_size


def test_dense_text_model_has_no_experts():
    config = parse_model_config(make_text(model_type="ernie4_5", moe_num_experts=0, moe_k=...))
    assert (config.num_pools, config.moe_layers, config.num_experts) == (0, (), 0)


def test_vision_width_comes_from_mlp_ratio_or_is_stated():
    assert parse_model_config(make_paddle()).vision.intermediate_size == 256
    raw = make_paddle(vision_config={"depth": 1, "hidden_size": 64, "num_heads": 4, "intermediate_size": 96})
    assert parse_model_config(raw).vision.intermediate_size == 96


def test_end_tokens_of_the_generation_config_are_added(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(make_paddle()))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 100272]}))
    assert read_model_config(tmp_path).eos_token_ids == (2, 100272)


# overrides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_paddle, make_transformers])
def test_fewer_layers_keep_the_expert_layers_consistent(make: Any):
    config = parse_model_config(make(), {"num_hidden_layers": 2})
    assert (config.num_layers, config.moe_layers) == (2, (1,))


def test_preset_is_cut_to_eight_layers():
    config = read_preset("ernie-4.5-21b-a3b", num_hidden_layers=8)
    assert config.moe_layers == tuple(range(1, 8))
    assert round(total_parameters(config) / 1e9, 2) == 5.94


def test_vision_override_keeps_the_other_vision_keys():
    config = parse_model_config(make_paddle(), {"vision_config": {"depth": 1}})
    assert (config.vision.depth, config.vision.hidden_size) == (1, 64)


@pytest.mark.parametrize(
    ("overrides", "nearest"),
    [
        ({"num_hiden_layers": 8}, "num_hidden_layers"),
        ({"vision_config": {"dept": 1}}, "vision_config.depth"),
    ],
)
def test_unknown_override_is_refused_with_the_nearest_name(overrides: dict[str, Any], nearest: str):
    with pytest.raises(ConfigError, match=f"nearest is {nearest}$"):
        parse_model_config(make_paddle(), overrides)


@pytest.mark.parametrize(
    ("make", "overrides", "field", "expected"),
    [
        (make_transformers, {"torch_dtype": "float32"}, "dtype", "float32"),
        (make_paddle, {"dtype": "float32"}, "dtype", "float32"),
        (make_transformers, {"im_patch_id": 90000}, "image_patch_id", 90000),
        (make_transformers, {"moe_layer_start_index": 2}, "moe_layers", (2, 3)),
    ],
)
def test_override_wins_over_another_spelling_of_the_same_key(
    make: Any, overrides: dict[str, Any], field: str, expected: Any
):
    assert getattr(parse_model_config(make(), overrides), field) == expected


# refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"model_type": ...}, "model_type"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vision_config": ...}, "vision_config is missing"),
        ({"vision_config": {"depth": 2, "embed_dim": 64}}, r"vision_config\.num_heads"),
        ({"vision_config": {"depth": 2, "embed_dim": 64, "num_heads": 5}}, r"vision_config\.num_heads"),
        ({"pixel_hidden_size": 1280}, "pixel_hidden_size"),
        ({"moe_num_experts": [8, 4]}, "moe_num_experts"),
        ({"moe_num_experts": 0}, "moe_num_experts"),
        ({"moe_num_experts": [8, 8, 8]}, "moe_num_experts"),
        ({"moe_intermediate_size": [64]}, "moe_intermediate_size"),
        ({"moe_k": 9}, "moe_k"),
        ({"moe_layer_start_index": [1, 2]}, "moe_layer_start_index"),
        ({"freq_allocation": 20}, "freq_allocation"),
        ({"freq_allocation": 6, "rope_scaling": {"mrope_section": [6, 6, 4]}}, "freq_allocation"),
        ({"rope_scaling": {"mrope_section": [4, 6, 6]}}, "mrope_section"),
        ({"rope_scaling": {"type": "yarn"}}, r"rope_scaling\.type"),
        ({"use_bias": True}, "use_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_temporal_conv": False}, "use_temporal_conv"),
        ({"torch_dtype": "float16"}, "torch_dtype"),
        ({"vocab_size": 1000}, "im_patch_id"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ],
)
def test_value_that_cannot_be_served_is_refused_by_name(changes: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=named):
        parse_model_config(make_paddle(**changes))


def test_too_few_layer_types_are_refused():
    with pytest.raises(ConfigError, match="mlp_layer_types"):
        parse_model_config(make_transformers(), {"num_hidden_layers": 5})


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_unreadable_config_file_is_named(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_config(tmp_path)


# tensor parallelism -------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "sizes"), [("ernie-4.5-vl-424b-a47b", 8), ("ernie-4.5-vl-28b-a3b", 4)])
def test_published_models_divide_by_their_usual_ranks(preset: str, sizes: int):
    check_tensor_parallel(read_preset(preset), sizes)


def test_uneven_split_names_every_width_that_does_not_divide():
    with pytest.raises(ConfigError, match=r"num_attention_heads = 20.*sizes that do: 1, 2, 4$"):
        check_tensor_parallel(read_preset("ernie-4.5-vl-28b-a3b"), 8)
    config = parse_model_config(make_paddle(num_attention_heads=12, num_key_value_heads=3, head_dim=32))
    with pytest.raises(ConfigError, match=r"num_key_value_heads = 3"):
        check_tensor_parallel(config, 4)


def test_kv_heads_may_be_fewer_than_ranks_when_they_divide_them():
    check_tensor_parallel(parse_model_config(make_paddle(num_key_value_heads=2)), 8)


# sizes of the published models --------------------------------------------------------------------

# Totals, and what a text token reads, in parameters: model specification 10.5-1.
SIZES = {
    "ernie-4.5-vl-424b-a47b": (423.526, 47.079),
    "ernie-4.5-vl-28b-a3b": (29.399, 3.352),
    "ernie-4.5-300b-a47b": (299.484, 47.079),
    "ernie-4.5-21b-a3b": (21.825, 3.352),
    "ernie-4.5-0.3b": (0.361, 0.361),
}
# Billions per component, specification 1.6: 424B, 28B, 300B, 21B, 0.3B.
TABLE = {
    "embedding": (0.8472, 0.2648, 0.8472, 0.2648, 0.1059),
    "lm_head": (0.8472, 0, 0.8472, 0, 0),
    "qkv": (4.5298, 0.2569, 4.5298, 0.2569, 0.0472),
    "o_proj": (3.6239, 0.1835, 3.6239, 0.1835, 0.0377),
    "dense_ffn": (2.1139, 0.0944, 2.1139, 0.0944, 0.1699),
    "text_experts": (287.4944, 20.3843, 287.4944, 20.3843, 0),
    "vision_experts": (123.2119, 6.7948, 0, 0, 0),
    "shared_experts": (0, 0.6370, 0, 0.6370, 0),
    "routers": (0.0535, 0.0088, 0.0267, 0.0044, 0),
    "norms": (0.0009, 0.0001, 0.0009, 0.0001, 0),
    "vision_tower": (0.6304, 0.6304, 0, 0, 0),
    "resampler": (0.1731, 0.1442, 0, 0, 0),
}


@pytest.mark.parametrize("preset", SIZES)
def test_preset_sums_to_the_published_size(preset: str):
    config = read_preset(preset)
    sums = total_parameters(config) / 1e9, active_parameters(config) / 1e9
    assert (round(sums[0], 3), round(sums[1], 3)) == SIZES[preset]


@pytest.mark.parametrize(("column", "preset"), list(enumerate(SIZES)))
def test_preset_components_match_the_published_table(column: int, preset: str):
    counts = parameter_counts(read_preset(preset))
    assert counts.keys() == TABLE.keys()
    wrong = {k: v / 1e9 for k, v in counts.items() if abs(v / 1e9 - TABLE[k][column]) > 0.00006}
    assert wrong == {}


def test_vision_token_reads_the_narrower_experts():
    actives = [active_parameters(read_preset(name), pool=1) / 1e9 for name in list(SIZES)[:2]]
    assert [round(value, 2) for value in actives] == [25.70, 1.81]


def test_every_preset_file_is_covered_here():
    assert {file.stem for file in PRESETS.glob("*.json")} == set(SIZES)

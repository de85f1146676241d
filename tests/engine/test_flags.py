"""The command line as an operator meets it."""

from __future__ import annotations

import json
import shlex
import socket

import msgspec
import pytest

from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.flag_table import GROUPS, IGNORED
from engine.flags import CommandLine, check_ports_are_free, describe_config, parse_command_line

GUIDE = """
--model /models/ernie --port 8180 --metrics-port 8181 --engine-worker-queue-port 8182 --tensor-parallel-size 8
--max-model-len 131072 --max-num-seqs 16 --limit-mm-per-prompt '{"image": 100, "video": 100}'
--reasoning-parser ernie-45-vl --gpu-memory-utilization 0.8 --enable-chunked-prefill
--max-num-batched-tokens 384 --quantization wint4 --enable-mm
"""


def parse(line: str = "", **environment: str) -> CommandLine:
    return parse_command_line(shlex.split(line), environment)


def complaint(line: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(line)
    return str(caught.value)


def test_the_guides_command_sets_what_it_says():
    config = parse(GUIDE, ENABLE_V1_KVCACHE_SCHEDULER="1").config
    assert config == ServerConfig(
        model="/models/ernie",
        port=8180,
        metrics_port=8181,
        tensor_parallel_size=8,
        max_model_len=131072,
        max_num_seqs=16,
        limit_mm_per_prompt={"image": 100, "video": 100},
        reasoning_parser="ernie-45-vl",
        gpu_memory_utilization=0.8,
        enable_chunked_prefill=True,
        max_num_batched_tokens=384,
        quantization="wint4",
    )


def test_flags_without_effect_give_one_line_each():
    notes = parse(GUIDE, ENABLE_V1_KVCACHE_SCHEDULER="1").notes
    assert [note.split()[0] for note in notes] == [
        "--enable-mm",
        "--engine-worker-queue-port",
        "ENABLE_V1_KVCACHE_SCHEDULER",
    ]


@pytest.mark.parametrize("ignored", IGNORED, ids=lambda one: one.name)
def test_every_ignored_flag_is_accepted_with_a_reason(ignored):
    (note,) = parse(f"{ignored.name} {'5' if ignored.takes_value else ''}").notes
    assert note == f"{ignored.name} has no effect: {ignored.why}"


def test_no_flags_give_the_defaults():
    assert parse() == CommandLine(ServerConfig())


def test_every_setting_has_a_flag():
    set_by_flags = {flag.field for group in GROUPS.values() for flag in group}
    assert set_by_flags == {one.name for one in msgspec.structs.fields(ServerConfig)} - {
        "run_directory",
        "display_name",
    }


def test_help_tells_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as left:
        parse("--help")
    assert left.value.code == 0
    text = capsys.readouterr().out
    flags = [flag for group in GROUPS.values() for flag in group]
    assert all(name in text for flag in flags for name in flag.names)
    assert text.count("(default:") == len(flags)
    assert all(len(line) <= 110 for line in text.splitlines())


@pytest.mark.parametrize("spelling", ["--tp 4", "-tp 4", "--tensor-parallel-size=4"])
def test_short_forms_of_tensor_parallel_size(spelling):
    assert parse(spelling).config.tensor_parallel_size == 4


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("wint4", "wint4"),
        ("wint8", "wint8"),
        ("bf16", "bfloat16"),
        ("none", "bfloat16"),
        ("BF16", "bfloat16"),
    ],
)
def test_spellings_of_the_quantisation(typed, meant):
    assert parse(f"--quant {typed}").config.quantization == meant


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "bfloat16", "int8"])
def test_types_of_the_kv_cache(kv_cache_dtype):
    assert parse(f"--kv-cache-dtype {kv_cache_dtype}").config.kv_cache_dtype == kv_cache_dtype


@pytest.mark.parametrize(
    ("flag", "on"), [("--enable-chunked-prefill", True), ("--no-enable-chunked-prefill", False)]
)
def test_booleans_can_be_switched_on_and_off(flag, on):
    assert parse(flag).config.enable_chunked_prefill is on


@pytest.mark.parametrize(
    ("typed", "num_bytes"),
    [("4096", 4096), ("512MiB", 512 << 20), ("1.5G", 3 << 29), ("2gb", 2 << 30), ("8k", 8192)],
)
def test_sizes_take_units(typed, num_bytes):
    assert parse(f"--kv-cache-memory {typed}").config.kv_cache_memory == num_bytes


@pytest.mark.parametrize(("typed", "num_bytes"), [("4", 4 << 30), ("0.5", 1 << 29), ("512MiB", 1 << 29)])
def test_swap_space_without_a_unit_is_in_gibibytes(typed, num_bytes):
    assert parse(f"--swap-space {typed}").config.swap_space == num_bytes


def test_a_kind_left_out_of_the_media_limits_keeps_its_default():
    assert parse("""--limit-mm-per-prompt '{"image": 3}'""").config.limit_mm_per_prompt == {
        "image": 3,
        "video": 100,
    }


def test_api_keys_come_from_flags_or_else_from_the_environment():
    assert parse("--api-key a --api-key b", OCTET_API_KEY="c").config.api_keys == ("a", "b")
    assert parse(OCTET_API_KEY="c, d", FD_API_KEY="e").config.api_keys == ("c", "d")
    assert parse(FD_API_KEY="e").config.api_keys == ("e",)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "--tensor-paralel-size 8",
            "there is no flag --tensor-paralel-size; did you mean --tensor-parallel-size?",
        ),
        ("--quantisation=wint4", "there is no flag --quantisation; did you mean --quantization?"),
        ("--zzz", "there is no flag --zzz; see --help"),
        ("--max-num 3", "there is no flag --max-num; did you mean --max-num-seqs?"),
        ("wint4", "'wint4' is not a flag and no flag takes it as its value; see --help"),
        ("--port", "--port needs a value"),
        ("--port eighty", "--port: 'eighty': expected a whole number"),
        ("--port 0", "--port: '0': expected a number from 1 to 65535"),
        ("--port 9000 --metrics-port 9000", "--port and --metrics-port are both 9000; they have to differ"),
        (
            "--gpu-memory-utilization 1.2",
            "--gpu-memory-utilization: '1.2': expected a number above 0 and at most 1",
        ),
        ("--gpu-memory-utilization nan", "--gpu-memory-utilization: 'nan': expected a finite number"),
        ("--rank-timeout 0", "--rank-timeout: '0': expected a number of seconds above 0"),
        ("--swap-space four", "--swap-space: 'four': expected a number"),
        ("--kv-cache-memory 4GB/s", "--kv-cache-memory: '4GB/s': expected a number"),
        ("--kv-cache-dtype fp8", "--kv-cache-dtype: 'fp8': expected auto, bfloat16 or int8"),
        ("--max-num-seqs -3", "--max-num-seqs: '-3': expected a number from 1 to 4096"),
        (
            "--quant wint3",
            "--quantization: 'wint3': expected wint4, wint4-all, wint8, bfloat16, bf16 or none; "
            "did you mean wint8?",
        ),
        ("--load-format dumy", "--load-format: 'dumy': expected auto or dummy; did you mean dummy?"),
    ],
)
def test_mistakes_are_one_sentence(line, sentence):
    assert complaint(line) == sentence


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--limit-mm-per-prompt", "{image: 3}", "not valid JSON"),
        ("--limit-mm-per-prompt", "[1]", "expected a JSON object"),
        ("--limit-mm-per-prompt", '{"image": -1}', "image is -1, expected a whole number of at least 0"),
        ("--limit-mm-per-prompt", '{"image": true}', "image is True, expected a whole number"),
        ("--limit-mm-per-prompt", '{"audio": 1}', "unknown kind 'audio', expected image or video"),
        ("--mm-processor-kwargs", '{"image_max_pixel": 1}', "did you mean image_max_pixels?"),
        ("--mm-processor-kwargs", '{"image_max_pixels": "many"}', "expected a positive whole number"),
        ("--mm-processor-kwargs", '{"video_fps": 0}', "expected a positive number of frames per second"),
        (
            "--mm-processor-kwargs",
            '{"video_frames_sample": "last"}',
            "expected 'leading', 'middle' or 'rand'",
        ),
        (
            "--mm-processor-kwargs",
            '{"video_min_frames": 9, "video_max_frames": 3}',
            "video_min_frames is 9, more than",
        ),
        ("--config-overrides", "3", "expected a JSON object"),
    ],
)
def test_json_flags_say_which_key_is_wrong(flag, value, words):
    assert words in complaint(f"{flag} {shlex.quote(value)}")


def test_processor_options_are_kept_as_given():
    options = {"image_max_pixels": 4842768, "video_fps": 0.5, "video_frames_sample": "middle"}
    assert (
        parse(f"--mm-processor-kwargs {shlex.quote(json.dumps(options))}").config.mm_processor_kwargs
        == options
    )


def test_print_config_shows_the_settings_and_no_keys():
    line = parse("--print-config --tp 8 --api-key secret")
    shown = describe_config(line.config)
    assert line.print_config and json.loads(shown)["tensor_parallel_size"] == 8 and "secret" not in shown


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"--port {port} cannot be used on 127.0.0.1: Address already in use"
        ):
            check_ports_are_free(ServerConfig(host="127.0.0.1", port=port))


def test_a_host_that_is_not_ours_is_named():
    with pytest.raises(ConfigError, match=r"--host no such host is not an address"):
        check_ports_are_free(ServerConfig(host="no such host"))

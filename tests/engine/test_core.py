"""The engine core as a process, over fake ranks and real sockets: what the api and the operator see."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from engine.config import read_config
from engine.messages import AbortRequest, EngineState, MediaItem, Ping, Pong, RequestObserved, TokenBatch
from tests.engine.builders import make_request
from tests.engine.fake_rank import VOCAB_SIZE
from tests.engine.processes import FakeApi, fetch, processes_naming, running_core, wait_until


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short enough for the sockets inside."""
    return tmp_path_factory.mktemp("core")


def test_requests_are_answered_token_by_token(folder):
    with running_core(folder) as (core, api):
        ready = api.wait_for_state("ready")
        assert (ready.num_blocks, ready.block_size) == (64, 16)  # the poorer of the two ranks decides
        outputs = api.ask(make_request("one", prompt_len=100, max_tokens=5))
        assert [len(output.token_ids) for output in outputs] == [1] * 5
        assert all(0 <= output.token_ids[0] < VOCAB_SIZE for output in outputs)
        assert outputs[-1].finish_reason == "length"
        assert core.terminate() == 0


def test_outputs_do_not_depend_on_company(folder):
    requests = [make_request(f"r{i}", prompt_len=3 + 5 * i, max_tokens=6) for i in range(12)]
    with running_core(folder) as (_, api):
        api.wait_for_state("ready")
        for request in requests:
            api.send(request)
        together = api.outputs_until_finished(*(request.request_id for request in requests))
        for request in requests:
            alone = api.ask(make_request("alone", prompt=request.prompt_token_ids, max_tokens=6))
            tokens = [output.token_ids for output in together[request.request_id]]
            assert tokens == [output.token_ids for output in alone]


def test_an_api_that_comes_later_learns_the_state(folder):
    with running_core(folder) as (core, api):
        api.wait_for_state("ready")
        with FakeApi(core.run, "api-1") as late:
            state = late.receive()
            assert isinstance(state, EngineState) and state.state == "ready"
            assert late.ask(make_request("late", max_tokens=2))[-1].finish_reason == "length"


def test_requests_of_an_api_that_left_are_aborted(folder):
    with running_core(folder, "slow") as (core, api):
        api.wait_for_state("ready")
        with FakeApi(core.run, "api-1") as guest:
            guest.send(make_request("theirs", prompt_len=10, max_tokens=200))
            guest.receive_until(lambda one: isinstance(one, TokenBatch))
        wait_until(lambda: metric(core, "octet:kv_blocks_used") == 0, "the blocks to be free")
        aborted = 'octet:requests_total{finish_reason="abort"}'
        wait_until(lambda: metric(core, aborted) == 1, "the abort to count")


def test_abort_frees_the_blocks_within_one_step(folder):
    with running_core(folder, "slow") as (core, api):
        api.wait_for_state("ready")
        api.send(make_request("long", prompt_len=20, max_tokens=200))
        api.receive_until(lambda one: isinstance(one, TokenBatch))
        assert metric(core, "octet:kv_blocks_used") > 0
        api.send(AbortRequest("long"))
        outputs = api.outputs_until_finished("long")["long"]
        assert outputs[-1].finish_reason == "abort" and len(outputs) <= 4
        assert metric(core, "octet:kv_blocks_used") == 0
        assert metric(core, "octet:num_requests_running") == 0


def test_malformed_messages_are_dropped_and_others_served(folder):
    with running_core(folder) as (core, api):
        api.wait_for_state("ready")
        for data in (b"", b"\xc1", b"\x81\xa4type\xa3add", b"x" * 10_000):
            api.send_raw(data)
        assert api.ask(make_request("fine", max_tokens=2))[-1].finish_reason == "length"
        assert core.log.count("dropped a malformed message") == 4


def test_a_request_with_odd_fields_is_its_own_error(folder):
    with running_core(folder) as (_, api):
        api.wait_for_state("ready")
        oddities = [
            make_request("long", prompt_len=256),
            make_request("outside", prompt=[10**9]),
            make_request("no-file", media=[MediaItem("image", "h", (1, 2, 2), 0, 1, "absent")]),
            make_request("escape", media=[MediaItem("image", "h", (1, 2, 2), 0, 1, "../config.json")]),
        ]
        for request in oddities:
            (output,) = api.ask(request)
            assert output.finish_reason == "error" and output.error
        assert api.ask(make_request("fine", max_tokens=2))[-1].finish_reason == "length"


def test_media_files_live_as_long_as_a_request_needs_them(folder):
    with running_core(folder, "slow") as (core, api):
        api.wait_for_state("ready")
        file = core.run.media / "picture"
        file.write_bytes(bytes(16 * 588))
        media = [MediaItem("image", "h", (1, 4, 4), 2, 4, "picture")]
        api.send(make_request("long", prompt_len=10, max_tokens=200, media=media))
        assert api.ask(make_request("short", prompt_len=10, max_tokens=1, media=media))[-1].token_ids
        assert file.exists()
        api.send(AbortRequest("long"))
        wait_until(lambda: not file.exists(), "the file to be deleted")


def test_ping_goes_through_the_ranks_and_comes_back(folder):
    with running_core(folder) as (_, api):
        api.wait_for_state("ready")
        api.send(Ping(7))
        pong = api.receive_until(lambda one: isinstance(one, Pong))
        assert pong == Pong(7, True, "serving")


def test_ping_while_loading_is_answered_unhealthy(folder):
    with running_core(folder, "load-for-ever") as (_, api):
        api.receive()
        api.send(Ping(7))
        pong = api.receive_until(lambda one: isinstance(one, Pong))
        assert not pong.healthy


def test_loading_progress_reaches_the_api(folder):
    with running_core(folder, "load-for-ever") as (core, api):
        state = api.receive_until(lambda one: isinstance(one, EngineState) and "weights" in one.detail)
        assert state.detail.startswith("weights 0.00 of 0.00 GB")
        assert core.terminate() == 0


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("die", "rank 1 ended unexpectedly (killed by SIGKILL)"),
        ("fail", "rank 1 failed in step 1: the numbers are wrong"),
        ("freeze", "rank 1 has given no sign of life for 1 s"),
    ],
)
def test_a_lost_rank_is_named_in_every_open_request_and_ends_the_core(folder, behaviour, words):
    with running_core(folder, behaviour, max_num_seqs=1) as (core, api):
        api.wait_for_state("ready")
        began = time.monotonic()
        api.send(make_request("running", max_tokens=200))
        api.send(make_request("waiting", max_tokens=200))
        outputs = api.outputs_until_finished("running", "waiting")
        for output in (outputs["running"][-1], outputs["waiting"][-1]):
            assert output.finish_reason == "error" and output.error_status == 503
            assert words in output.error
        assert words in api.wait_for_state("failed").detail
        assert core.wait() == 1
        assert time.monotonic() - began < 10
        assert words in core.log
        assert not core.rank_pids()


def test_a_failing_ranks_traceback_is_in_the_log(folder):
    with running_core(folder, "fail") as (core, api):
        api.wait_for_state("ready")
        api.ask(make_request("one"))
        core.wait()
        assert "ValueError: the numbers are wrong" in core.log


def test_a_rank_that_dies_at_start_is_named_with_its_last_words(folder):
    with running_core(folder, "die-early") as (core, api):
        assert core.wait() == 1
        assert "rank 1 ended unexpectedly (exit code 3)" in core.log
        assert "this machine has no soul" in core.log
        assert "rank 1" in api.wait_for_state("failed").detail


def test_too_small_a_cache_is_one_sentence_with_what_would_fit(folder):
    with running_core(folder, "little-memory") as (core, _):
        assert core.wait() == 2
        assert "has room for 48 tokens, fewer than --max-model-len 256; set --max-model-len 48" in core.log
        assert "Traceback" not in core.log


def test_sigterm_while_loading_ends_at_once(folder):
    with running_core(folder, "load-for-ever") as (core, api):
        api.receive()
        began = time.monotonic()
        assert core.terminate() == 0
        assert time.monotonic() - began < 3
        assert not core.rank_pids()


def test_sigterm_ends_open_requests_and_all_ranks(folder):
    with running_core(folder, "slow") as (core, api):
        api.wait_for_state("ready")
        api.send(make_request("open", prompt_len=10, max_tokens=200))
        api.receive_until(lambda one: isinstance(one, TokenBatch))
        assert core.terminate() == 0
        last = api.outputs_until_finished("open")["open"][-1]
        assert (last.finish_reason, last.error_status) == ("error", 503)
        assert api.wait_for_state("stopping")
        assert not core.rank_pids()


def test_killing_the_core_takes_the_ranks_along(folder):
    with running_core(folder) as (core, api):
        api.wait_for_state("ready")
        assert len(core.rank_pids()) == 2
        os.kill(core.process.pid, signal.SIGKILL)
        wait_until(lambda: not processes_naming(str(core.run.root)), "the ranks to be gone")


def test_metrics_count_what_happened(folder):
    with running_core(folder) as (core, api):
        api.wait_for_state("ready")
        api.ask(make_request("one", prompt_len=70, max_tokens=5))
        api.send(RequestObserved("/v1/chat/completions", 200, 0.5, "", 2, 1, 0.25, 0.125))
        api.send(Ping(1))
        api.receive_until(lambda one: isinstance(one, Pong))
        wait_until(
            lambda: metric(core, 'octet:requests_total{finish_reason="length"}') == 1, "the request to count"
        )
        expected = {
            "octet:prompt_tokens_total": 70,
            "octet:generation_tokens_total": 5,
            "octet:time_to_first_token_seconds_count": 1,
            "octet:time_per_output_token_seconds_count": 1,
            "octet:e2e_request_latency_seconds_count": 1,
            "octet:kv_blocks_total": 64,
            "octet:kv_blocks_used": 0,
            "octet:num_requests_running": 0,
            'octet:http_requests_total{error_type="",route="/v1/chat/completions",status="200"}': 1,
            'octet:media_items_total{kind="image"}': 2,
            "octet:stream_seconds_sum": 0.125,
            "octet:step_seconds_count": 6,
        }
        assert {name: metric(core, name) for name in expected} == expected


def metric(core, name: str) -> float:
    """The value of one series on the metrics port."""
    text = fetch(read_config(core.run.config).metrics_port, "/metrics")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return float(values.get(name, "nan"))

"""What a client may say about its place in the queue, through the whole server."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.media import image_part
from tests.e2e.server import Server, await_true, running_server

pytestmark = pytest.mark.e2e

ENDLESS = 20_000  # tokens: more than any machine makes before the timeouts below


def ask(server: Server, content: Any, **fields: Any) -> tuple[int, dict[str, Any]]:
    body = {
        "messages": [{"role": "user", "content": content}],
        "ignore_eos": True,
        "temperature": 0,
        **fields,
    }
    request = urllib.request.Request(
        f"{server.address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_timeouts_end_requests_and_free_everything(tmp_path: Path) -> None:
    with running_server(tmp_path, "--max-num-seqs", "1") as server:
        status, body = ask(server, "Count.", max_tokens=ENDLESS, timeout=3, timings=True)
        choice, usage, timings = body["choices"][0], body["usage"], body["timings"]
        assert (status, choice["finish_reason"]) == (200, "length"), body
        assert 0 < usage["completion_tokens"] < ENDLESS
        assert 2900 < timings["total_ms"] < 30_000, timings

        runs = threading.Thread(
            target=ask, args=(server, "Count."), kwargs={"max_tokens": ENDLESS, "timeout": 6}
        )
        runs.start()
        await_true(lambda: server.metric("octet:num_requests_running") == 1, 20, "the first one runs")
        status, body = ask(server, "And I?", max_tokens=4, timeout=0.3)
        assert (status, body["error"]["code"], body["error"]["param"]) == (504, "timeout", "timeout"), body
        runs.join()
        await_true(lambda: server.metric("octet:kv_blocks_used") == 0, 20, "all blocks are free")


def test_timings_tell_where_the_time_went(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        content = [image_part(1, 448, 448), {"type": "text", "text": "What is it?"}]
        _, body = ask(server, content, max_tokens=16, timings=True)
    timings = body["timings"]
    phases = [timings[f"{phase}_ms"] for phase in ("prepare", "queue", "prefill", "decode")]
    assert sum(phases) == pytest.approx(timings["total_ms"], abs=0.01)
    assert 0 < timings["media_ms"] <= timings["prepare_ms"], timings
    assert 0 < timings["encode_ms"] <= timings["prefill_ms"], timings
    assert timings["decode_ms"] > 0 and timings["preempted_ms"] == 0, timings


def test_salted_requests_share_nothing_with_others(tmp_path: Path) -> None:
    story = "Once upon a time there was a small model on a large machine. " * 20
    content = [image_part(1, 224, 196), {"type": "text", "text": story}]

    def cached(**fields: Any) -> tuple[int, float, str]:
        before = server.metric("octet:encoded_patches_total")
        _, body = ask(server, content, max_tokens=4, **fields)
        details = body["usage"]["prompt_tokens_details"]
        encoded = server.metric("octet:encoded_patches_total") - before
        return details["cached_tokens"], encoded, body["choices"][0]["message"]["content"]

    with running_server(tmp_path) as server:
        plain, salted = cached(), cached(cache_salt="mine")
        again, salted_again = cached(), cached(cache_salt="mine")
    assert plain[:2] == salted[:2] and plain[0] == 0 and plain[1] > 0, (plain, salted)
    assert again[0] == salted_again[0] > 0 and again[1] == salted_again[1] == 0, (again, salted_again)
    assert len({plain[2], salted[2], again[2], salted_again[2]}) == 1

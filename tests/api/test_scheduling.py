"""Fields that say how a request is to be scheduled, whose it is, and where its time went."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from aiohttp import web

from engine.messages import AddRequest, RequestOutput, Timings
from tests.api.builders import running_api
from tests.api.fakes import say

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BASES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    TEXT: {"prompt": "Hi"},
}
PHASES = ["prepare_ms", "queue_ms", "prefill_ms", "decode_ms"]
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def said_late(queue_seconds: float) -> Any:
    """A script: three tokens, the first of which says how long it waited."""

    def script(request: AddRequest) -> Iterator[RequestOutput]:
        yield RequestOutput(request.request_id, [111], queue_seconds=queue_seconds)
        yield RequestOutput(request.request_id, [107])
        yield RequestOutput(request.request_id, [33], finish_reason="length")

    return script


@pytest.mark.parametrize("route", [CHAT, TEXT])
async def test_scheduling_fields_reach_the_engine(route: str) -> None:
    fields = {"priority": -3, "timeout": 2.5, "cache_salt": "s", "user": "anna", "n": 2}
    async with running_api(say("ok")) as api:
        status, body, headers = await api.post(route, {**BASES[route], **fields})
        assert status == 200 and "X-Octet-Warning" not in headers, body
        for added in api.engine.added:
            told = (added.priority, added.timeout, added.cache_salt, added.tenant)
            assert told == (-3, 2.5, "s", "anna")
        assert len(api.engine.added) == 2


async def test_without_them_a_request_is_like_all_others() -> None:
    async with running_api(say("ok")) as api:
        await api.chat(priority=None, timeout=None, cache_salt=None, user=None, timings=None)
        (added,) = api.engine.added
    assert (added.priority, added.timeout, added.cache_salt, added.tenant) == (0, 0.0, "", "")


async def test_with_keys_the_key_is_the_tenant_whatever_user_says() -> None:
    async with running_api(say("ok"), api_keys=("key-a", "key-b")) as api:
        headers = {"Authorization": "Bearer key-b"}
        status, _, _ = await api.post(CHAT, {**BASES[CHAT], "user": "key-a"}, headers=headers)
        assert status == 200
        status, _, _ = await api.post(CHAT, BASES[CHAT], headers={"Authorization": "Bearer key-c"})
        assert status == 401
        assert [added.tenant for added in api.engine.added] == ["key-b"]


async def test_key_that_the_server_does_not_ask_for_names_no_tenant() -> None:
    async with running_api(say("ok")) as api:
        await api.post(CHAT, BASES[CHAT], headers={"Authorization": "Bearer whatever"})
        assert api.engine.added[0].tenant == ""


async def test_pictures_of_another_salt_are_other_pictures() -> None:
    async with running_api(say("ok")) as api:
        hashes = []
        for salt in ("", "a", "b"):
            api.services.prompts._media._count = 0  # type: ignore[attr-defined]  # the same picture each time
            status, body, _ = await api.chat([PICTURE, PICTURE], **({"cache_salt": salt} if salt else {}))  # type: ignore[arg-type]
            assert status == 200, body
            hashes += [item.content_hash for item in api.engine.added[-1].media]
    assert len(set(hashes)) == 6
    assert all(len(one) == 64 for one in hashes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", 1001), ("priority", -1001), ("priority", 1.5), ("priority", "high"),
        ("timeout", 0), ("timeout", -1), ("timeout", 1e9), ("timeout", "5s"),
        ("cache_salt", "x" * 513), ("cache_salt", 5),
        ("user", "x" * 513), ("timings", 1), ("timings", "yes"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("route", [CHAT, TEXT])
async def test_wrong_values_are_refused_by_name(route: str, field: str, value: Any) -> None:
    async with running_api(say("ok")) as api:
        status, body, _ = await api.post(route, {**BASES[route], field: value})
        assert (status, body["error"]["param"]) == (400, field), body
        assert api.engine.added == []


@pytest.mark.parametrize("route", [CHAT, TEXT])
async def test_timings_add_up_to_the_whole(route: str) -> None:
    async with running_api(said_late(0.0)) as api:
        _, body, _ = await api.post(route, {**BASES[route], "timings": True, "max_tokens": 3})
    timings = body["timings"]
    assert set(timings) == {*PHASES, "media_ms", "total_ms", "encode_ms", "preempted_ms", "stream_ms"}
    assert all(timings[phase] >= 0 for phase in PHASES), timings
    assert timings["total_ms"] > 0
    assert sum(timings[phase] for phase in PHASES) == pytest.approx(timings["total_ms"], abs=0.01)


async def test_what_only_the_engine_knows_comes_from_its_last_output() -> None:
    def script(request: AddRequest) -> Iterator[RequestOutput]:
        yield RequestOutput(request.request_id, [111])
        known = Timings(0.0, 0.5, 0.25, encode_seconds=0.125, preempted_seconds=0.0625)
        yield RequestOutput(request.request_id, [107], finish_reason="length", timings=known)

    async with running_api(script) as api:
        _, body, _ = await api.chat(timings=True, max_tokens=2, n=2)
    assert (body["timings"]["encode_ms"], body["timings"]["preempted_ms"]) == (125.0, 62.5)


async def test_it_says_nothing_of_an_answer_that_a_stop_string_ended() -> None:
    async with running_api() as api:
        asked = asyncio.create_task(api.chat(timings=True, stop="o"))
        request = await api.engine.next_request()
        await api.engine.send(request.request_id, [111])
        _, body, _ = await asked
    assert (body["timings"]["encode_ms"], body["timings"]["preempted_ms"]) == (None, None)


async def test_time_in_the_queue_is_the_engines() -> None:
    """It counts from the arrival; what this process spent before is not queueing."""
    async with running_api() as api:
        asked = asyncio.create_task(api.chat(timings=True, max_tokens=2))
        request = await api.engine.next_request()
        while time.monotonic() < request.arrival + 0.02:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await api.engine.send(request.request_id, [111], queue_seconds=time.monotonic() - request.arrival)
        await api.engine.send(request.request_id, [107], finish_reason="length")
        _, body, _ = await asked
    timings = body["timings"]
    assert timings["prepare_ms"] + timings["queue_ms"] >= 20.0, timings
    assert timings["queue_ms"] > 0, timings


@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("route", [CHAT, TEXT])
async def test_stream_ends_with_a_chunk_of_timings(route: str, usage: bool) -> None:
    body = {**BASES[route], "timings": True, "stream": True, "max_tokens": 3}
    if usage:
        body["stream_options"] = {"include_usage": True}
    async with running_api(said_late(0.0)) as api, api.http.post(api.url + route, json=body) as answer:
        events = [line[6:] for line in (await answer.text()).splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    *chunks, last = [msgspec.json.decode(event) for event in events[:-1]]
    assert last["choices"] == [] and set(last["timings"]) >= set(PHASES), last
    assert ("usage" in last) == usage
    assert all("timings" not in chunk for chunk in chunks)


async def test_a_slow_reader_is_seen_in_timings_and_metrics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = web.StreamResponse.write

    async def write_slowly(response: web.StreamResponse, data: bytes) -> None:
        until = time.monotonic() + 0.02
        while time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await write(response, data)

    monkeypatch.setattr(web.StreamResponse, "write", write_slowly)
    async with running_api() as api:
        body = {**BASES[CHAT], "timings": True, "stream": True, "max_tokens": 2}
        asked = asyncio.create_task(api.http.post(api.url + CHAT, json=body))
        request = await api.engine.next_request()
        await api.engine.send(request.request_id, [111])
        answer = await asked  # its head is there, so the first text is being written
        await api.engine.send(request.request_id, [107], finish_reason="length")
        events = [line[6:] for line in (await answer.text()).splitlines() if line.startswith("data: ")]
        await api.engine.until(lambda: api.engine.observed, "the observation")
    timings = msgspec.json.decode(events[-2])["timings"]
    assert timings["stream_ms"] >= 20.0, timings
    assert api.engine.observed[0].stream_seconds >= 0.02  # for the metrics


async def test_nobody_gets_timings_unasked() -> None:
    async with running_api(said_late(0.0)) as api:
        _, body, _ = await api.chat(max_tokens=3)
    assert "timings" not in body


async def test_timeout_before_the_first_token_is_a_504() -> None:
    def script(request: AddRequest) -> Iterator[RequestOutput]:
        message = "the request's timeout of 1 s passed before its first token"
        yield RequestOutput(request.request_id, finish_reason="error", error=message, error_status=504)

    async with running_api(script) as api:
        status, body, _ = await api.chat(timeout=1.0)
        api.assert_nothing_open()
    assert status == 504
    assert body["error"] == {
        "message": "The request's timeout of 1 s passed before its first token.",
        "type": "server_error",
        "param": "timeout",
        "code": "timeout",
    }

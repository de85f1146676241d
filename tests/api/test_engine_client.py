"""The api when its engine starts, refuses, stumbles, falls silent or dies."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from engine.messages import RequestOutput
from tests.api.builders import Api, running_api
from tests.api.fakes import say

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


async def open_stream(api: Api, client: openai.AsyncOpenAI) -> Any:
    """A stream whose first token has arrived."""
    opening = asyncio.create_task(client.chat.completions.create(model="x", messages=MESSAGES, stream=True))
    request = await api.engine.next_request()
    await api.engine.send(request.request_id, [65])
    stream = await opening
    await stream.__anext__()
    return stream


async def test_requests_before_ready_get_503_and_a_time_to_retry() -> None:
    async with running_api(say("ok"), ready=False) as api:
        await api.services.engine.until_state("starting")
        status, body, headers = await api.chat()
        assert (status, headers["Retry-After"]) == (503, "5")
        assert body["error"]["code"] == "engine_unavailable"
        assert (await api.get("/ready"))[0] == 503 and (await api.get("/health"))[0] == 503
        assert (await api.get("/live"))[0] == 200
        await api.engine.set_state("ready")
        await api.services.engine.until_state("ready")
        assert (await api.get("/ready"))[0] == 200 and (await api.chat())[0] == 200


async def test_ready_tells_the_progress_of_loading() -> None:
    async with running_api(ready=False) as api:
        while (answer := await api.get("/ready"))[1].get("detail") != "loading weights":
            assert answer[0] == 503
    assert answer[1]["status"] == "starting"


async def test_a_full_queue_is_429_even_for_a_stream() -> None:
    def refuse(request: Any) -> Any:
        message = "1024 requests are waiting already."
        yield RequestOutput(request.request_id, finish_reason="error", error=message, error_status=429)

    async with running_api(refuse) as api:
        for stream in (False, True):
            status, body, headers = await api.chat(stream=stream)
            assert (status, headers["Retry-After"]) == (429, "1")
            assert body["error"]["message"] == "1024 requests are waiting already."
        api.assert_nothing_open()


async def test_one_refused_choice_ends_the_whole_request() -> None:
    async with running_api() as api:
        asked = asyncio.create_task(api.chat(n=3))
        await api.engine.until(lambda: len(api.engine.live) == 3, "three sequences")
        second = list(api.engine.live)[1]
        await api.engine.send(second, finish_reason="error", error="No room.", error_status=429)
        assert (await asked)[0] == 429
        await api.engine.until(lambda: len(api.engine.aborted) == 2, "two aborts")
        api.assert_nothing_open()


async def test_a_failed_engine_ends_streams_with_its_reason() -> None:
    async with running_api() as api, api.client() as client:
        stream = await open_stream(api, client)
        waiting = asyncio.create_task(api.complete())
        await api.engine.until(lambda: len(api.engine.added) == 2, "two requests")
        await api.engine.set_state("failed", "rank 1 was killed by SIGKILL")
        with pytest.raises(openai.APIError, match="rank 1"):
            await stream.__anext__()
        status, body, _ = await waiting
        assert status == 503 and "rank 1" in body["error"]["message"]
        assert (await api.get("/health"))[1]["detail"] == "rank 1 was killed by SIGKILL"
        assert (await api.chat())[0] == 503
        assert api.services.engine.num_open == 0


async def test_an_error_inside_a_stream_is_followed_by_done() -> None:
    async with running_api() as api:
        body = {"messages": MESSAGES, "stream": True}
        post = asyncio.create_task(api.http.post(api.url + "/v1/chat/completions", json=body))
        request = await api.engine.next_request()
        await api.engine.send(request.request_id, [65])
        answer = await post
        await api.engine.send(
            request.request_id, finish_reason="error", error="Rank 2 failed.", error_status=503
        )
        events = (await answer.read()).decode().split("\n\n")
        assert '"error":{"message":"Rank 2 failed.","type":"server_error"' in events[-3]
        assert events[-2:] == ["data: [DONE]", ""]
        await api.engine.until(lambda: api.engine.observed, "the observation")
        assert api.engine.observed[-1].status == 503


async def test_a_dead_engine_process_is_noticed_at_once() -> None:
    async with running_api() as api:
        waiting = asyncio.create_task(api.complete())
        await api.engine.next_request()
        await api.engine.close()
        status, body, _ = await waiting
        assert status == 503 and "gone" in body["error"]["message"]
        assert (await api.get("/ready"))[1]["status"] == "failed"


async def test_a_lost_batch_fails_what_is_open_and_nothing_later() -> None:
    async with running_api() as api:
        waiting = asyncio.create_task(api.complete())
        request = await api.engine.next_request()
        api.engine.sequence += 1
        await api.engine.send(request.request_id, [65], finish_reason="stop")
        status, body, _ = await waiting
        assert status == 500 and "lost" in body["error"]["message"]
        await api.engine.until(lambda: api.engine.aborted, "an abort")
        api.engine.script = say("ok")
        assert (await api.complete())[0] == 200


async def test_a_damaged_message_fails_what_is_open_and_nothing_later() -> None:
    async with running_api() as api:
        waiting = asyncio.create_task(api.complete())
        await api.engine.next_request()
        await api.engine.send_bytes(b"\xc1 nonsense")
        status, body, _ = await waiting
        assert status == 500 and "damaged" in body["error"]["message"]
        api.engine.script = say("ok")
        assert (await api.complete())[0] == 200


async def test_health_goes_through_the_ranks_and_names_the_missing_one() -> None:
    async with running_api(rank_timeout=0.2) as api:
        assert await _health(api) == (200, "healthy", None)
        api.engine.is_healthy = False
        assert await _health(api) == (503, "unhealthy", "rank 3 is silent")
        api.engine.answers_pings = False
        assert (await _health(api))[:2] == (503, "unhealthy")


async def _health(api: Api) -> tuple[int, str, str | None]:
    status, body, _ = await api.get("/health")
    return status, body["status"], body.get("detail")


async def test_many_probes_share_one_ping() -> None:
    async with running_api(rank_timeout=0.2) as api:
        api.engine.answers_pings = False
        await asyncio.gather(*[api.get("/health") for _ in range(20)])
        assert api.engine.num_pings == 1

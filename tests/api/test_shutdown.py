"""SIGTERM: no new request, open ones may finish for a while, the rest end with an error."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from tests.api.builders import running_api


async def test_open_requests_finish_during_the_drain() -> None:
    async with running_api() as api:
        await asyncio.gather(api.get("/live"), api.get("/live"))  # two connections that stay
        asked = asyncio.create_task(api.chat())
        request = await api.engine.next_request()
        draining = asyncio.create_task(api.server.drain(20.0))
        await asyncio.sleep(0)
        status, body, _ = await api.get("/ready")
        assert (status, body["status"]) == (503, "stopping")
        await api.engine.send(request.request_id, [65], finish_reason="stop")
        assert (await asked)[0] == 200
        await draining


async def test_new_requests_are_refused_during_the_drain() -> None:
    async with running_api() as api:
        assert (await api.get("/live"))[0] == 200  # opens a connection that stays
        await api.server.drain(0.0)
        status, body, headers = await api.chat()
        assert status == 503 and headers["Retry-After"] == "5" and "shutting down" in body["error"]["message"]
        with pytest.raises(aiohttp.ClientConnectorError):
            async with aiohttp.ClientSession() as fresh:
                await fresh.get(api.url + "/live")


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_open_after_the_drain_ends_with_an_error(stream: bool) -> None:
    async with running_api() as api:
        asked = asyncio.create_task(
            api.http.post(api.url + "/v1/completions", json={"prompt": "x", "stream": stream})
        )
        request = await api.engine.next_request()
        if stream:
            await api.engine.send(request.request_id, [65])
            await asked
        await api.server.drain(0.05)
        answer = await asked
        text = await answer.text()
        assert "shutting down" in text and (answer.status, stream) in ((503, False), (200, True))
        await api.engine.until(lambda: api.engine.aborted, "an abort")
        api.assert_nothing_open()

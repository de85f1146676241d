"""A client that leaves is forgotten within one step, whatever it was waiting for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.messages import AddRequest, RequestOutput
from tests.api.builders import Api, running_api
from tests.conftest import Rand

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1000}


async def leave(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def read_until(api: Api, body: dict[str, Any], num_lines: int) -> None:
    """Stream, and close the connection after some lines."""
    async with api.http.post(api.url + "/v1/chat/completions", json={**body, "stream": True}) as answer:
        for _ in range(num_lines):
            if not await answer.content.readline():
                return


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_before_the_first_token_aborts_every_sequence(stream: bool, n: int) -> None:
    async with running_api() as api:
        asked = asyncio.create_task(api.post("/v1/chat/completions", {**BODY, "stream": stream, "n": n}))
        await api.engine.until(lambda: len(api.engine.live) == n, f"{n} sequences")
        sequences = list(api.engine.live)
        await leave(asked)
        await api.engine.until(lambda: len(api.engine.aborted) == n, f"{n} aborts")
        assert sorted(api.engine.aborted) == sorted(sequences)
        await api.engine.until(lambda: api.engine.observed, "the observation")
        assert api.engine.observed[-1].status == 499
        api.assert_nothing_open()


async def test_leaving_a_running_stream_aborts_it_without_another_token() -> None:
    async with running_api() as api:
        reading = asyncio.create_task(read_until(api, BODY, 2))
        request = await api.engine.next_request()
        await api.engine.send(request.request_id, [65])
        await reading
        await api.engine.until(lambda: api.engine.aborted, "an abort")
        assert api.engine.aborted == [request.request_id]


async def test_late_outputs_of_an_aborted_sequence_are_ignored() -> None:
    async with running_api() as api:
        reading = asyncio.create_task(read_until(api, BODY, 2))
        request = await api.engine.next_request()
        await api.engine.send(request.request_id, [65])
        await reading
        await api.engine.until(lambda: api.engine.aborted, "an abort")
        await api.engine.send(request.request_id, [66])
        await api.engine.send(request.request_id, finish_reason="abort")
        status, _, _ = await api.get("/health")  # travels behind the late outputs
        assert status == 200
        api.assert_nothing_open()


async def test_64_streams_with_random_cancels_leave_nothing_open(rand: Rand) -> None:
    def script(request: AddRequest) -> Any:
        for index in range(40):
            reason = "length" if index == 39 else None
            yield RequestOutput(request.request_id, [97 + index % 26], finish_reason=reason)  # type: ignore[arg-type]

    async with running_api(script) as api:
        lines = [rand.python.choice([0, 1, 5, 20, 1000]) for _ in range(64)]
        await asyncio.gather(*[read_until(api, BODY, count) for count in lines])
        await api.engine.until(lambda: len(api.engine.observed) == 64, "the end of 64 requests")
        api.assert_nothing_open()
        assert len(api.engine.added) == 64


async def test_leaving_while_the_body_is_sent_leaves_nothing() -> None:
    async with running_api() as api:
        host, port = api.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        await writer.drain()
        while not api.services.admission.num_open:  # noqa: ASYNC110
            await asyncio.sleep(0)
        writer.close()
        await api.engine.until(lambda: api.engine.observed, "the observation")
        api.assert_nothing_open()
        assert api.engine.added == []


async def test_a_stream_of_two_clients_does_not_mix() -> None:
    """Outputs of both sequences travel in the same batches; each client sees its own letter only."""
    async with running_api() as api, api.client() as client:

        async def collect(letter: str) -> str:
            messages: Any = [{"role": "user", "content": letter}]
            stream: Any = await client.chat.completions.create(model="any", messages=messages, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        tasks = [asyncio.create_task(collect(letter)) for letter in "ab"]
        await api.engine.until(lambda: len(api.engine.live) == 2, "two sequences")
        prompts = {
            r.request_id: bytes(i for i in r.prompt_token_ids if i < 256) for r in api.engine.live.values()
        }
        letters = {key: "a" if b"User: a" in prompt else "b" for key, prompt in prompts.items()}
        for step in range(20):
            reason = "length" if step == 19 else None
            outputs = [RequestOutput(k, [ord(v)], finish_reason=reason) for k, v in letters.items()]  # type: ignore[arg-type]
            await api.engine.send_batch(outputs)
        assert await asyncio.gather(*tasks) == ["a" * 20, "b" * 20]

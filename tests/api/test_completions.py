"""POST /v1/completions: raw prompts in every form."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.builders import running_api
from tests.api.fakes import say


async def test_text_is_continued_without_a_template() -> None:
    async with running_api(say("two")) as api, api.client() as client:
        answer = await client.completions.create(model="any", prompt="One, ")
        assert api.engine.added[0].prompt_token_ids == list(b"One, ")
        assert api.engine.added[0].sampling.max_tokens == 16
    assert answer.choices[0].text == "two" and answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens == 3


async def test_stream_adds_up_to_the_whole_text() -> None:
    async with running_api(say("t", "w", "o")) as api, api.client() as client:
        stream = await client.completions.create(
            model="any", prompt="One, ", stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "two"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        ("ab", [[97, 98]]),
        (["a", "b"], [[97], [98]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
async def test_prompts_come_in_four_forms(prompt: Any, token_ids: list[list[int]]) -> None:
    async with running_api(say("x")) as api:
        status, body, _ = await api.complete(prompt, n=2)
        assert status == 200, body
        assert [request.prompt_token_ids for request in api.engine.added] == [
            p for p in token_ids for _ in "12"
        ]
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(token_ids)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, token_ids))


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        ("", "prompt"),
        ([], "prompt"),
        (["a", 1], "prompt[1]"),
        ([1, "a"], "prompt[1]"),
        ([[1], "a"], "prompt[1]"),
        ([[1], []], "prompt[1]"),
        ([[1], ["a"]], "prompt[1][0]"),
        ([97, 9999], "prompt[1]"),
        ([-1], "prompt[0]"),
        ({"a": 1}, "prompt"),
        (5, "prompt"),
    ],
)
async def test_a_wrong_prompt_is_refused_with_its_path(prompt: Any, param: str) -> None:
    async with running_api() as api:
        status, body, _ = await api.complete(prompt)
    assert (status, body["error"]["param"]) == (400, param)


async def test_placeholders_without_media_are_refused() -> None:
    async with running_api() as api:
        placeholder = api.services.model.image_patch_id
        status, body, _ = await api.complete([97, placeholder, placeholder])
    assert status == 400 and "placeholder" in body["error"]["message"]


async def test_echo_puts_the_prompt_before_each_text() -> None:
    async with running_api(say("t", "wo")) as api, api.client() as client:
        whole = await client.completions.create(model="any", prompt="One, ", echo=True, n=2)
        stream = await client.completions.create(model="any", prompt="One, ", echo=True, stream=True)
        streamed = "".join([chunk.choices[0].text async for chunk in stream])
    assert [choice.text for choice in whole.choices] == ["One, two"] * 2
    assert streamed == "One, two"


async def test_logprobs_have_offsets_into_the_text() -> None:
    async with running_api(say("ab", "c", logprobs=True)) as api, api.client() as client:
        answer = await client.completions.create(model="any", prompt="One, ", logprobs=2)
        assert api.engine.added[0].sampling.num_logprobs == 2
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.text_offset) == (["a", "b", "c"], [0, 1, 2])
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.top_logprobs is not None and logprobs.top_logprobs[1] == {"b": -0.5, "A": -1.5}


async def test_too_many_sequences_are_refused_before_any_is_made() -> None:
    async with running_api() as api:
        status, body, _ = await api.complete(["a"] * 65, n=2)
        assert api.engine.added == []
    assert (status, body["error"]["param"]) == (400, "n")


async def test_a_long_text_does_not_hold_up_the_event_loop() -> None:
    async with running_api(say("x"), context=1 << 20) as api:
        status, _, _ = await api.complete("long " * 100_000)
        assert status == 200

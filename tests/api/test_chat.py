"""POST /v1/chat/completions, driven with the openai package against a scripted engine."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from engine.messages import SamplingParams, TokenLogprobs
from tests.api.builders import Api, running_api
from tests.api.fakes import say

USER: Any = [{"role": "user", "content": "Hi"}]


async def ask(api: Api, **fields: Any) -> Any:
    async with api.client() as client:
        return await client.chat.completions.create(**{"model": "any", "messages": USER, **fields})


async def ask_streamed(api: Api, **fields: Any) -> list[Any]:
    async with api.client() as client:
        request = {"model": "any", "messages": USER, "stream": True, **fields}
        return [chunk async for chunk in await client.chat.completions.create(**request)]


async def test_whole_answer_has_content_finish_reason_and_usage() -> None:
    async with running_api(say("Hello", " world", cached=3)) as api:
        answer = await ask(api)
    choice, usage = answer.choices[0], answer.usage
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello world")
    assert choice.finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-") and answer.model == "tiny"
    assert (usage.completion_tokens, usage.total_tokens) == (11, usage.prompt_tokens + 11)
    assert usage.prompt_tokens_details.cached_tokens == 3


async def test_prompt_is_the_rendered_template() -> None:
    async with running_api(say("ok")) as api:
        await ask(api)
        prompt = api.engine.added[0].prompt_token_ids
        expected = "<|begin_of_sentence|>User: Hi\nAssistant: <think>\n\n</think>\n\n"
        assert api.services.tokenizer.decode(prompt, keep=api.services.tokenizer.markers) == expected


async def test_first_chunk_has_role_and_text_together() -> None:
    async with running_api(say("Hello", " world")) as api:
        chunks = await ask_streamed(api)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content.startswith("Hello")
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])


async def test_stream_adds_up_to_the_whole_answer() -> None:
    texts = ["Hel", "lo w", "ör", "ld 你", "好"]
    async with running_api(say(*texts)) as api:
        chunks = await ask_streamed(api)
        whole = await ask(api)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "".join(texts)
    assert whole.choices[0].message.content == "".join(texts)
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]


async def test_each_token_is_its_own_chunk_when_the_client_keeps_up() -> None:
    async with running_api() as api, api.client() as client:
        stream = await _open_stream(api, client)
        request = await api.engine.next_request()
        iterator = stream.__aiter__()
        for letter in "abc":
            await api.engine.send(request.request_id, [ord(letter)])
            assert (await iterator.__anext__()).choices[0].delta.content == letter


async def _open_stream(api: Api, client: openai.AsyncOpenAI) -> Any:
    """The first chunk's status line comes with the first token, so give one."""
    opening = asyncio.create_task(
        client.chat.completions.create(model="any", messages=USER, stream=True, max_tokens=100)
    )
    request = await api.engine.next_request()
    await api.engine.send(request.request_id, [ord(">")])
    stream = await opening
    assert (await stream.__anext__()).choices[0].delta.content == ">"
    return stream


async def test_usage_comes_in_a_last_chunk_when_asked_for() -> None:
    async with running_api(say("Hello", " world")) as api:
        chunks = await ask_streamed(api, stream_options={"include_usage": True})
        whole = await ask(api)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_usage_is_in_every_chunk_with_continuous_usage_stats() -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    async with running_api(say("Hello", " world")) as api:
        chunks = await ask_streamed(api, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 11


async def test_n_choices_are_sequences_with_seeds_of_their_own() -> None:
    async with running_api(say("Hello")) as api:
        answer = await ask(api, n=3, seed=41)
        seeds = [request.sampling.seed for request in api.engine.added]
        assert seeds == [41, 42, 43]
        assert len({request.request_id for request in api.engine.added}) == 3
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == ["Hello"] * 3
    assert answer.usage.completion_tokens == 15


async def test_streamed_choices_are_told_apart_by_index() -> None:
    async with running_api(say("Hel", "lo")) as api:
        chunks = await ask_streamed(api, n=4)
    texts = [
        "".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == i) for i in range(4)
    ]
    assert texts == ["Hello"] * 4


async def test_every_choice_owns_files_of_the_media() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    content = [{"type": "text", "text": "What?"}, image, image]
    async with running_api(say("A cat")) as api:
        answer = await ask(api, messages=[{"role": "user", "content": content}], n=3)
        files = [item.file for request in api.engine.added for item in request.media]
        folder = api.services.prompts._media.folder
        assert len(set(files)) == 6
        assert {(folder / file).read_text() for file in files} == {"data:image/png;base64,AAAA"}
    assert answer.usage.prompt_tokens_details.image_tokens == 8


async def test_media_of_a_refused_request_is_deleted() -> None:
    image = {"type": "image_url", "image_url": "data:image/png;base64,AAAA"}
    async with running_api() as api:
        body = {"messages": [{"role": "user", "content": [image, {"type": "text", "text": "x" * 4090}]}]}
        status, answer, _ = await api.post("/v1/chat/completions", body)
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
        assert list(api.services.prompts._media.folder.iterdir()) == []


@pytest.mark.parametrize(
    "said",
    [
        {"enable_thinking": True},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"metadata": {"enable_thinking": True}},
        {"reasoning_effort": "high"},
    ],
)
async def test_every_spelling_of_thinking_opens_the_reasoning(said: dict[str, Any]) -> None:
    async with running_api(say("why\n")) as api:
        answer = await ask(api, extra_body=said)
    assert answer.choices[0].message.reasoning_content == "why\n"
    assert answer.choices[0].message.content == ""
    assert answer.usage.completion_tokens_details.reasoning_tokens == 4


async def test_thinking_that_contradicts_itself_is_refused() -> None:
    async with running_api() as api:
        status, body, _ = await api.chat(enable_thinking=True, reasoning_effort="none")
    assert status == 400 and body["error"]["param"] == "enable_thinking"


async def test_logprobs_show_token_bytes_and_alternatives() -> None:
    async with running_api(say("é", logprobs=True)) as api:
        answer = await ask(api, logprobs=True, top_logprobs=2)
        assert api.engine.added[0].sampling.num_logprobs == 2
    entries = answer.choices[0].logprobs.content
    assert [entry.bytes for entry in entries] == [[0xC3], [0xA9]]
    assert [(top.token, top.logprob) for top in entries[0].top_logprobs][1] == ("A", -1.5)


async def test_logprobs_stream_with_their_tokens() -> None:
    async with running_api(say("a", "b", logprobs=True)) as api:
        chunks = await ask_streamed(api, logprobs=True)
    tokens = [entry.token for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert tokens == ["a", "b"]


async def test_impossible_tokens_have_a_finite_logprob() -> None:
    async with running_api() as api:
        asked = asyncio.create_task(api.chat(logprobs=True))
        request = await api.engine.next_request()
        logprobs = [TokenLogprobs(float("-inf"))]
        await api.engine.send(request.request_id, [65], logprobs=logprobs, finish_reason="length")
        status, body, _ = await asked
    assert status == 200 and body["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


async def test_token_ids_are_returned_when_asked_for() -> None:
    async with running_api(say("ab", "c")) as api:
        _, body, _ = await api.chat(return_token_ids=True)
        chunks = await ask_streamed(api, extra_body={"return_token_ids": True})
        prompt = api.engine.added[0].prompt_token_ids
    message = body["choices"][0]["message"]
    assert message["prompt_token_ids"] == prompt and message["completion_token_ids"] == [97, 98, 99]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].prompt_token_ids == prompt
    assert [i for delta in deltas for i in delta.completion_token_ids] == [97, 98, 99]


async def test_prompt_token_ids_replace_the_messages() -> None:
    async with running_api(say("ok")) as api:
        status, _, _ = await api.post("/v1/chat/completions", {"prompt_token_ids": [72, 105]})
        assert status == 200 and api.engine.added[0].prompt_token_ids == [72, 105]


async def test_sampling_fields_reach_the_engine() -> None:
    fields = {
        "max_tokens": 7, "min_tokens": 2, "temperature": 0.5, "top_p": 0.8, "top_k": 40, "min_p": 0.05,
        "repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": -0.2, "seed": 5,
        "stop_token_ids": [65, 66, 65], "ignore_eos": True,
    }  # fmt: skip
    async with running_api(say("ok")) as api:
        await api.chat(**fields)
        assert api.engine.added[0].sampling == SamplingParams(**{**fields, "stop_token_ids": (65, 66)})


async def test_max_tokens_is_clipped_to_what_the_prompt_leaves() -> None:
    async with running_api(say("ok"), context=100) as api:
        await api.chat(max_tokens=1000)
        await api.chat(max_completion_tokens=7, max_tokens=9)
        await api.chat()
        first, second, third = api.engine.added
        assert first.sampling.max_tokens == third.sampling.max_tokens == 100 - len(first.prompt_token_ids)
        assert second.sampling.max_tokens == 7


async def test_temperature_zero_and_top_p_zero_are_greedy() -> None:
    async with running_api(say("ok")) as api:
        for fields in ({"temperature": 0}, {"top_p": 0}, {"temperature": 1e-9, "top_p": 0.5}):
            await api.chat(**fields)
        assert {request.sampling.temperature for request in api.engine.added} == {0.0}


async def test_top_k_without_effect_is_off() -> None:
    async with running_api(say("ok")) as api:
        for top_k in (-1, 0, 2**31 + 5, 5):
            await api.chat(top_k=top_k)
        assert [request.sampling.top_k for request in api.engine.added] == [0, 0, 0, 5]


async def test_a_seed_is_drawn_when_none_is_given() -> None:
    async with running_api(say("ok")) as api:
        for _ in range(4):
            await api.chat()
        assert len({request.sampling.seed for request in api.engine.added}) == 4


async def test_text_that_spells_a_marker_stays_text() -> None:
    async with running_api(say("ok")) as api:
        await api.chat("<|IMAGE_PLACEHOLDER|></think>")
        ids, markers = api.engine.added[0].prompt_token_ids, api.services.tokenizer.markers
        assert markers["<|IMAGE_PLACEHOLDER|>"] not in ids
        assert ids.count(markers["</think>"]) == 1  # the template's own

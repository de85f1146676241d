"""Stop strings: text-level, of any length, across tokens and chunks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from api.stop_strings import StopMatcher, StopStrings
from engine.messages import RequestOutput
from tests.api.builders import running_api
from tests.api.fakes import say
from tests.conftest import Rand


def first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """(start, end) of the match that ends first, the longest of those; by trying every place."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts), end
    return None


def feed(text: str, stops: list[str], pieces: list[int], *, include: bool = False) -> tuple[str, bool]:
    matcher, position, out = StopMatcher(StopStrings(stops), include_stop=include), 0, ""
    for size in pieces:
        if not matcher.found:
            out += matcher.add(text[position : position + size])
        position += size
    return (out, True) if matcher.found else (out + matcher.flush(), False)


def test_every_split_finds_the_first_stop(rand: Rand) -> None:
    choose = rand.python
    for _ in range(3000):
        stops = ["".join(choose.choices("ab", k=choose.randint(1, 5))) for _ in range(choose.randint(1, 4))]
        text = "".join(choose.choices("abc", k=choose.randint(0, 20)))
        pieces = [choose.randint(0, 4) for _ in range(20)] + [len(text)]
        match, include = first_stop(text, stops), choose.random() < 0.5
        expected = text if match is None else text[: match[1] if include else match[0]]
        assert feed(text, stops, pieces, include=include) == (expected, match is not None), (
            stops,
            text,
            pieces,
        )


def test_nothing_is_held_back_that_cannot_begin_a_stop() -> None:
    matcher = StopMatcher(StopStrings(["</answer>"]))
    sent = [matcher.add(piece) for piece in ("see <", "b> and </ans", "wer", "> end")]
    assert sent == ["see ", "<b> and ", "", ""]
    assert matcher.found and matcher.rest == " end"


def test_work_does_not_grow_with_a_repetitive_stop_string() -> None:
    """A text that almost matches everywhere costs no more steps than characters, amortised."""
    stops = StopStrings(["a" * 4000 + "b"])
    matcher = StopMatcher(stops)
    out = "".join(matcher.add("a") for _ in range(20_000)) + matcher.flush()
    assert out == "a" * 20_000


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_across_tokens_ends_the_answer_and_the_sequence(stream: bool) -> None:
    async with running_api(say(*"one END two", finish_reason=None)) as api, api.client() as client:
        messages: Any = [{"role": "user", "content": "Hi"}]
        answer: Any = await client.chat.completions.create(
            model="any", messages=messages, stop=[" END"], stream=stream
        )
        if stream:
            chunks = [chunk async for chunk in answer]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, reason) == ("one", "stop")
        await api.engine.until(lambda: api.engine.aborted, "an abort")
        assert api.engine.aborted == [api.engine.added[0].request_id]


async def test_the_engine_grouping_its_outputs_changes_nothing() -> None:
    """Text, token count and token ids are the same for one big output as for single tokens."""
    bodies = []
    for texts in (["one END two"], list("one END two"), ["one E", "ND two"]):
        async with running_api(say(*texts, finish_reason="length")) as api:
            _, body, _ = await api.complete(stop="END", return_token_ids=True)
        choice = body["choices"][0]
        bodies.append(
            (choice["text"], choice["completion_token_ids"], choice["finish_reason"], body["usage"])
        )
    assert bodies[0] == bodies[1] == bodies[2]
    assert bodies[0][:3] == ("one ", list(b"one END"), "stop")


async def test_text_held_back_is_sent_when_it_was_no_stop() -> None:
    async with running_api(say(*"one EN", finish_reason="length")) as api:
        _, body, _ = await api.complete(stop="END")
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("one EN", "length")


async def test_the_stop_is_sent_when_asked_for() -> None:
    async with running_api(say("one END two")) as api:
        _, body, _ = await api.complete(stop=["END"], include_stop_str_in_output=True)
    assert body["choices"][0]["text"] == "one END"


async def test_stops_before_min_tokens_are_text() -> None:
    async with running_api(say("xx END END")) as api:
        _, body, _ = await api.complete(stop="END", min_tokens=6)
    assert body["choices"][0]["text"] == "xx END "


async def test_one_choice_stops_while_another_goes_on() -> None:
    async with running_api() as api:
        asked = asyncio.create_task(api.complete(stop="!", n=2))
        await api.engine.until(lambda: len(api.engine.live) == 2, "two sequences")
        first, second = api.engine.live
        await api.engine.send_batch([RequestOutput(first, list(b"a!b")), RequestOutput(second, list(b"c"))])
        await api.engine.until(lambda: api.engine.aborted, "an abort")
        await api.engine.send(second, list(b"d"), finish_reason="length")
        _, body, _ = await asked
        assert api.engine.aborted == [first]
    assert [choice["text"] for choice in body["choices"]] == ["a", "cd"]


@pytest.mark.parametrize("stop", [[""], ["x"] * 65, ["x" * 20_000]])
async def test_useless_or_huge_stops_are_refused(stop: list[str]) -> None:
    async with running_api() as api:
        status, body, _ = await api.complete(stop=stop)
    assert (status, body["error"]["param"]) == (400, "stop")

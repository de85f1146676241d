"""Reasoning apart from content: every split of the tokens gives the result of the whole."""

from __future__ import annotations

from typing import Any

import pytest

from api.answer import Answer, Delta, StopRule
from api.reasoning import ReasoningParser
from api.stop_strings import StopStrings
from api.tokenizer import Tokenizer
from engine.errors import ConfigError
from engine.messages import RequestOutput
from tests.api.builders import make_tokenizer, running_api
from tests.api.fakes import say
from tests.conftest import Rand

WORDS = ["a", "ö", "你", "\n", "<", "</", "</thin", "think>", " STOP", "ST", "\n\n"]


def make_parser(name: str = "", *, think_tokens: bool = True) -> tuple[Tokenizer, ReasoningParser]:
    tokenizer = make_tokenizer(think_tokens=think_tokens)
    return tokenizer, ReasoningParser(name, tokenizer, is_vision_model=True)


def token_ids_of(tokenizer: Tokenizer, *texts: str) -> list[int]:
    """The ids of plain texts with one closing tag between each two."""
    end = tokenizer.markers.get("</think>")
    ids: list[int] = []
    for index, text in enumerate(texts):
        if index:
            ids += list(b"</think>") if end is None else [end]
        ids += list(text.encode())
    return ids


def run(
    parser: ReasoningParser,
    token_ids: list[int],
    sizes: list[int],
    rule: StopRule | None,
    is_open: bool = True,
) -> tuple[Any, ...]:
    """What a client has in the end when the tokens come in pieces of these sizes."""
    answer, whole, position = Answer(parser.parts(thinking_open=is_open), rule), Delta(), 0
    for number, size in enumerate(sizes):
        piece = token_ids[position : position + size]
        position += size
        last = number == len(sizes) - 1
        answer.add(RequestOutput("r", piece, finish_reason="length" if last else None), whole)
    return (
        whole.reasoning, whole.content, whole.token_ids, whole.finish_reason,
        answer.num_tokens, answer.num_reasoning_tokens,
    )  # fmt: skip


@pytest.mark.parametrize("think_tokens", [True, False])
@pytest.mark.parametrize("with_stops", [False, True])
def test_every_split_gives_the_whole_result(rand: Rand, think_tokens: bool, with_stops: bool) -> None:
    tokenizer, parser = make_parser("ernie-45-vl", think_tokens=think_tokens)
    rule = StopRule(StopStrings([" STOP", "\n\n\n"]), min_tokens=3) if with_stops else None
    choose = rand.python
    for _ in range(400):
        texts = ["".join(choose.choices(WORDS, k=choose.randint(0, 8))) for _ in range(choose.randint(1, 3))]
        ids = token_ids_of(tokenizer, *texts)
        ids = ids[: len(ids) - choose.randint(0, 2)]  # may end inside a character or inside the tag
        sizes = [choose.randint(0, 5) for _ in range(12)]
        whole, split = run(parser, ids, [len(ids)], rule), run(parser, ids, [*sizes, len(ids)], rule)
        assert split == whole, (texts, sizes)


@pytest.mark.parametrize("think_tokens", [True, False])
@pytest.mark.parametrize(
    ("texts", "reasoning", "content"),
    [
        (["why\n", "\n\nbecause\n"], "why\n", "because\n"),
        (["only thoughts"], "only thoughts", ""),
        (["", "at once"], "", "at once"),
        (["why", "\n\n"], "why", ""),
    ],
)
def test_first_closing_tag_parts_reasoning_from_content(
    think_tokens: bool, texts: list[str], reasoning: str, content: str
) -> None:
    tokenizer, parser = make_parser("ernie-45-vl", think_tokens=think_tokens)
    ids = token_ids_of(tokenizer, *texts)
    assert run(parser, ids, [len(ids)], None)[:2] == (reasoning, content)


def test_reasoning_tokens_include_the_tag() -> None:
    tokenizer, parser = make_parser()
    ids = token_ids_of(tokenizer, "why", "so")
    assert run(parser, ids, [len(ids)], None)[-2:] == (6, 4)


def test_a_closed_prompt_gives_content_only() -> None:
    _, parser = make_parser()
    assert run(parser, list(b"\n\nHi"), [4], None, is_open=False)[:2] == ("", "\n\nHi")


def test_a_stop_string_does_not_reach_across_the_tag() -> None:
    tokenizer, parser = make_parser()
    ids = token_ids_of(tokenizer, "ST", "OP it STOP now")
    assert run(parser, ids, [len(ids)], StopRule(StopStrings(["STOP"])))[:2] == ("ST", "OP it ")


def test_parser_is_on_by_default_where_the_tag_is_a_token() -> None:
    assert [make_parser(think_tokens=known)[1].is_on for known in (True, False)] == [True, False]
    assert not make_parser("none")[1].is_on


def test_an_unknown_parser_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="qwen3"):
        make_parser("qwen3")


async def test_streamed_reasoning_and_content_come_in_their_own_fields() -> None:
    async with running_api() as api, api.client() as client:
        end = api.services.tokenizer.markers["</think>"]
        api.engine.script = lambda request: iter(
            [
                RequestOutput(request.request_id, list(b"why")),
                RequestOutput(request.request_id, [*b"?", end, *b"\n\nso"]),
                RequestOutput(request.request_id, list(b"!"), finish_reason="stop"),
            ]
        )
        messages: Any = [{"role": "user", "content": "Hi"}]
        stream = await client.chat.completions.create(
            model="any", messages=messages, stream=True, extra_body={"enable_thinking": True}
        )
        deltas: list[Any] = [chunk.choices[0].delta async for chunk in stream]
        whole: Any = await client.chat.completions.create(
            model="any", messages=messages, extra_body={"enable_thinking": True}
        )
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    content = "".join(delta.content or "" for delta in deltas)
    message = whole.choices[0].message
    assert (reasoning, content) == ("why?", "so!") == (message.reasoning_content, message.content)
    assert whole.usage.completion_tokens_details.reasoning_tokens == 5


async def test_parser_none_leaves_everything_in_the_content() -> None:
    async with running_api(say("why"), reasoning_parser="none") as api:
        _, body, _ = await api.chat(enable_thinking=True)
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "why", "refusal": None}

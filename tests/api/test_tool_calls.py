"""Tool calls out of an answer's text: the same message however the tokens come, streamed or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from api.answer import Answer, Delta, StopRule
from api.reasoning import ReasoningParser
from api.stop_strings import StopStrings
from api.tool_calls import ToolCallParser
from engine.messages import AddRequest, RequestOutput
from tests.api.builders import Api, make_tokenizer, running_api
from tests.api.fakes import Script, say
from tests.conftest import Rand


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}, **fields}}


TOOLS = [tool("sum"), tool("look_up")]
SUM = call("sum", '{"a": 1, "b": 2}')
TRICKY = call("look_up", '{"q": "</tool_call> \\"<tool_call>\\" 中文 \\\\"}')

# what the model writes: content, then (name, arguments) of every call
WRITTEN = [
    ("no calls <here>, only\n\n", "no calls <here>, only\n\n", []),
    (SUM, "", [("sum", '{"a": 1, "b": 2}')]),
    (f"\n\n{SUM}\n", "", [("sum", '{"a": 1, "b": 2}')]),
    (f"I add.\n{SUM}", "I add.", [("sum", '{"a": 1, "b": 2}')]),
    (f"{SUM}\n{TRICKY}", "",
     [("sum", '{"a": 1, "b": 2}'), ("look_up", '{"q": "</tool_call> \\"<tool_call>\\" 中文 \\\\"}')]),
    (f"{SUM}\n\nand then", "and then", [("sum", '{"a": 1, "b": 2}')]),
    ('<tool_call>{"arguments":{ "x" :[1,\n2]},"name":"sum"}</tool_call>', "", [("sum", '{ "x" :[1,\n2]}')]),
    ("a <tool_cal", "a <tool_cal", []),
    ("\n<tool_call>\n{\"name\": \"sum\"", "\n<tool_call>\n{\"name\": \"sum\"", []),
    (call("unknown", "{}"), call("unknown", "{}"), []),
    (call("sum", "[1]"), call("sum", "[1]"), []),
    (call("sum", "{"), call("sum", "{"), []),
    ('<tool_call>{"name": 5, "arguments": {}}</tool_call>',
     '<tool_call>{"name": 5, "arguments": {}}</tool_call>', []),
    (f'<tool_call>\nan "open quote\n</tool_call>\n{SUM}', '<tool_call>\nan "open quote\n</tool_call>',
     [("sum", '{"a": 1, "b": 2}')]),
    ("</tool_call> <tool_call></tool_call>", "</tool_call> <tool_call></tool_call>", []),
]  # fmt: skip


def pieces_of(ids: list[int], rand: Rand) -> Iterator[list[int]]:
    """The ids cut at random places, in pieces of 1 to 9."""
    start = 0
    while start < len(ids):
        size = rand.python.randint(1, 9)
        yield ids[start : start + size]
        start += size


def message_of(deltas: list[Delta]) -> tuple[str, str, list[tuple[int, str, str]], str | None]:
    calls = [(c.index, c.name, c.arguments) for delta in deltas for c in delta.tool_calls]
    content = "".join(delta.content for delta in deltas)
    return "".join(delta.reasoning for delta in deltas), content, calls, deltas[-1].finish_reason


def answered(ids: list[int], pieces: Iterator[list[int]], tokenizer: Any, **options: Any) -> tuple[Any, int]:
    """The message and the number of its tokens, from outputs with these pieces."""
    reasoning = ReasoningParser("ernie-45-vl", tokenizer, is_vision_model=True)
    parser = ToolCallParser({"sum", "look_up"}, only_first=options.pop("only_first", False))
    answer = Answer(
        reasoning.parts(thinking_open=options.pop("thinking", False)), options.pop("stop", None), parser
    )
    deltas = []
    for piece in pieces:
        deltas.append(Delta())
        answer.add(RequestOutput("r", piece), deltas[-1])
    deltas.append(Delta())
    answer.add(RequestOutput("r", [], finish_reason="stop"), deltas[-1])
    deltas[-1].finish_reason = answer.finish_reason
    return message_of(deltas), answer.num_tokens


@pytest.mark.parametrize(("text", "content", "calls"), WRITTEN)
@pytest.mark.parametrize("tool_tokens", [True, False])
def test_every_split_of_the_tokens_gives_the_same_message(
    text: str, content: str, calls: list[tuple[str, str]], tool_tokens: bool, rand: Rand
) -> None:
    tokenizer = make_tokenizer(tool_tokens=tool_tokens)
    markers = {"<tool_call>", "</tool_call>"} & tokenizer.markers.keys()
    ids = spelled(text, tokenizer, markers)
    expected = ("", content, [(i, *c) for i, c in enumerate(calls)], "tool_calls" if calls else "stop")
    assert answered(ids, iter([ids]), tokenizer) == (expected, len(ids))
    for _ in range(40):
        assert answered(ids, pieces_of(ids, rand), tokenizer) == (expected, len(ids))


def spelled(text: str, tokenizer: Any, markers: set[str]) -> list[int]:
    """Bytes, and tags outside of JSON strings as the tokens that some vocabularies have for them."""
    ids: list[int] = []
    while text:
        marker = next((m for m in markers if text.startswith(m)), None)
        taken = marker or text[0]
        ids += [tokenizer.markers[marker]] if marker else list(taken.encode())
        text = text[len(taken) :]
    return ids


def test_reasoning_stop_strings_and_calls_work_together_in_any_split(rand: Rand) -> None:
    tokenizer = make_tokenizer()
    text = f"I need {call('sum', '{}')} perhaps</think>\n\nHere:\n{SUM}\n{SUM} END {SUM}"
    ids = spelled(text, tokenizer, {"</think>"})
    rule = StopRule(StopStrings(["END"]))
    for _ in range(60):
        message, num_tokens = answered(ids, pieces_of(ids, rand), tokenizer, thinking=True, stop=rule)
        reasoning, content, calls, finish_reason = message
        assert reasoning == f"I need {call('sum', '{}')} perhaps"  # a call that is only thought of is none
        assert content == "Here: " and [c[:2] for c in calls] == [(0, "sum"), (1, "sum")]
        assert finish_reason == "tool_calls"
        assert num_tokens == len(ids) - len(f" {SUM}")


def test_with_one_call_allowed_the_answer_ends_with_it(rand: Rand) -> None:
    tokenizer = make_tokenizer()
    ids = list(f"{SUM}\n{TRICKY} more".encode())
    for _ in range(20):
        message, num_tokens = answered(ids, pieces_of(ids, rand), tokenizer, only_first=True)
        assert message == ("", "", [(0, "sum", '{"a": 1, "b": 2}')], "tool_calls")
        assert num_tokens == len(SUM)


# over HTTP ----------------------------------------------------------------------------------------


def in_bytes(text: str, size: int, *, ends: bool = True) -> Script:
    """Outputs of `size` bytes each; unless it `ends`, only an abort can end it."""
    data = text.encode()

    def script(request: AddRequest) -> Iterator[RequestOutput]:
        for start in range(0, len(data), size):
            yield RequestOutput(request.request_id, list(data[start : start + size]))
        if ends:
            yield RequestOutput(request.request_id, [], finish_reason="stop")

    return script


async def ask(api: Api, stream: bool, **fields: Any) -> Any:
    """The final choice as the openai client puts it together."""
    asked: dict[str, Any] = {"model": "x", "messages": [{"role": "user", "content": "Hi"}], **fields}
    async with api.client() as client:
        if not stream:
            return (await client.chat.completions.create(**asked)).choices[0]
        async with client.chat.completions.stream(**asked) as events:
            return (await events.get_final_completion()).choices[0]


def seen(choice: Any) -> Any:
    calls = [(c.type, c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]
    return choice.message.content, calls, choice.finish_reason


@pytest.mark.parametrize(("text", "content", "calls"), WRITTEN)
async def test_the_client_sees_the_same_message_streamed_and_whole(
    text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    expected = (
        content if content or not calls else None,
        [("function", *c) for c in calls],
        "tool_calls" if calls else "stop",
    )
    for size in (1, 7, 1000):
        async with running_api(in_bytes(text, size)) as api:
            whole = await ask(api, False, tools=TOOLS)
            streamed = await ask(api, True, tools=TOOLS)
            api.assert_nothing_open()
        assert seen(whole) == expected
        assert seen(streamed) == expected
        assert all(c.id.startswith("chatcmpl-tool-") for c in whole.message.tool_calls or [])


async def test_calls_stay_text_where_no_tools_are_offered() -> None:
    async with running_api(say(SUM)) as api:
        for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            choice = await ask(api, False, **fields)
            assert seen(choice) == (SUM, [], "stop")


async def test_a_named_function_is_the_only_one_that_counts() -> None:
    named = {"type": "function", "function": {"name": "look_up"}}
    async with running_api(in_bytes(f"{SUM}\n{TRICKY}\n{TRICKY}", 8, ends=False)) as api:
        choice = await ask(api, True, tools=TOOLS, tool_choice=named)
        await api.engine.until(lambda: not api.engine.live, "that the one call is there")
    content, calls, finish_reason = seen(choice)
    assert content == SUM and [name for _, name, _ in calls] == ["look_up"]
    assert finish_reason == "tool_calls"


async def test_without_parallel_calls_the_engine_is_told_to_stop_after_the_first() -> None:
    async with running_api(in_bytes(f"{SUM}\n{SUM}", 5, ends=False)) as api:
        choice = await ask(api, False, tools=TOOLS, parallel_tool_calls=False)
        await api.engine.until(lambda: not api.engine.live, "that the one call is there")
        api.assert_nothing_open()
    assert len(choice.message.tool_calls) == 1 and choice.finish_reason == "tool_calls"


async def test_a_call_cut_by_max_tokens_is_content_and_says_length() -> None:
    async with running_api(say(SUM[:-5], finish_reason="length")) as api:
        assert seen(await ask(api, False, tools=TOOLS)) == (SUM[:-5], [], "length")


async def test_arguments_come_back_as_the_client_can_read_them() -> None:
    async with running_api(say(TRICKY)) as api:
        (made,) = (await ask(api, False, tools=TOOLS)).message.tool_calls
    assert json.loads(made.function.arguments) == {"q": '</tool_call> "<tool_call>" 中文 \\'}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [tool("a"), tool("")]}, "tools[1].function.name"),
        ({"tools": [tool("a"), tool("a")]}, "tools[1].function.name"),
        ({"tools": [tool("a", parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "tool_choice.function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool("a", parameters={"type": "nonsense"})], "tool_choice": "required"}, "tools"),
    ],
)  # fmt: skip
async def test_what_is_wrong_with_tools_is_named(fields: dict[str, Any], param: str) -> None:
    async with running_api() as api:
        status, body, _ = await api.chat(**fields)
    assert (status, body["error"]["param"]) == (400, param), body


async def test_a_refusal_of_the_client_library_is_a_bad_request() -> None:
    async with running_api() as api:
        with pytest.raises(openai.BadRequestError, match="no tools"):
            await ask(api, False, tool_choice="required")

"""What requests ask of an answer's form: the grammar that reaches the ranks takes right answers only."""

from __future__ import annotations

import json
from typing import Any

import pytest

from api.guides import MAX_CHARACTERS
from engine.grammar import open_matcher, open_tokens
from engine.messages import Guide
from tests.api.builders import Api, running_api
from tests.api.fakes import say
from tests.api.test_tool_calls import SUM, TOOLS, call, tool

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NUMBER = {"type": "object", "properties": {"n": {"$ref": "#/$defs/N"}}, "required": ["n"],
          "$defs": {"N": {"type": "integer"}}}  # fmt: skip

COSTLY = [{"type": "string", "pattern": f"(a|b)*a(a|b){{{length}}}"} for length in range(3, 14)]


def json_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def takes(api: Api, guide: Guide, text: str) -> bool:
    """Whether the whole text, tags as their tokens, may be an answer."""
    tokenizer = api.services.tokenizer
    matcher = open_matcher(open_tokens(api.services.guides.vocabulary), guide.grammar)
    ids: list[int] = []
    while text:
        marker = next((m for m in tokenizer.markers if text.startswith(m)), None)
        ids += [tokenizer.markers[marker]] if marker else list(text[0].encode())
        text = text[len(marker or "x") :]
    return all(matcher.consume_token(i) for i in ids) and matcher.is_accepting()


async def guide_of(api: Api, path: str = "chat", **fields: Any) -> Guide | None:
    """What the engine is told for such a request."""
    status, body, _ = await (api.chat(**fields) if path == "chat" else api.complete(**fields))
    assert status == 200, body
    return api.engine.added[-1].sampling.guide


@pytest.mark.parametrize(
    ("fields", "right", "wrong"),
    [
        ({"response_format": {"type": "json_object"}}, ['{"a": [1, "}"]}', "{}"], ["[1]", '{"a": 1', "{} x"]),
        (json_schema(PERSON), ['{"name": "Ann", "age": 7}', '{\n  "name": "中", "age": -1\n}'],
         ['{"name": "Ann"}', '{"name": "Ann", "age": 7.5}', '{"age": 7, "name": "Ann"}']),
        ({"guided_json": PERSON}, ['{"name":"Ann","age":7}'], ['{"name": 1}']),
        ({"guided_json": json.dumps(PERSON)}, ['{"name":"Ann","age":7}'], ['{"name": 1}']),
        ({"guided_json": NUMBER}, ['{"n": 5}'], ['{"n": "5"}']),
        ({"guided_regex": r"\d{3}/[a-c]+"}, ["123/abc"], ["12/a", "123/d"]),
        ({"guided_regex": 'a/\nanswer: "b"|"'}, ['a/\nanswer: "b"', '"'], ["a", "b"]),
        ({"guided_choice": ["yes", "no\n", 'say "hi"', "多"]}, ["yes", "no\n", 'say "hi"', "多"], ["no"]),
        ({"guided_grammar": 'start: "x" NUMBER\nNUMBER: /[0-9]+/'}, ["x12"], ["x", "y1"]),
        ({"guided_grammar": 'root ::= "a" | "b" root'}, ["a", "bba"], ["b", "ab"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["chat", "completions"])
async def test_the_grammar_takes_right_answers_only(
    path: str, fields: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    async with running_api(say("ok")) as api:
        guide = await guide_of(api, path, **fields)
        assert guide is not None and guide.after == ""
        assert [text for text in right if not takes(api, guide, text)] == []
        assert [text for text in wrong if takes(api, guide, text)] == []


async def test_blanks_in_json_are_bounded() -> None:
    async with running_api(say("ok")) as api:
        guide = await guide_of(api, guided_json=PERSON)
        assert guide is not None
        assert takes(api, guide, '{"name": "A",' + "\n" + " " * 40 + '"age": 1}')
        assert not takes(api, guide, '{"name": "A",' + "  " + '"age": 1}')
        assert not takes(api, guide, '{"name": "A",' + "\n" + " " * 41 + '"age": 1}')


async def test_free_answers_have_no_guide() -> None:
    async with running_api(say("ok")) as api:
        assert await guide_of(api, response_format={"type": "text"}) is None
        assert await guide_of(api, tools=TOOLS) is None


async def test_the_form_begins_behind_the_reasoning() -> None:
    async with running_api(say("hm</think>{}")) as api:
        guide = await guide_of(api, enable_thinking=True, response_format={"type": "json_object"})
    assert guide is not None and guide.after == "</think>"


@pytest.mark.parametrize("tool_tokens", [True, False])
async def test_a_required_call_is_the_only_answer(tool_tokens: bool) -> None:
    tools = [tool("sum", parameters=NUMBER), tool("now", parameters=None), tool('odd "name" 名')]
    one, now = call("sum", '{"n": 1}'), call("now", "{}")
    async with running_api(say("ok"), tool_tokens=tool_tokens) as api:
        guide = await guide_of(api, tools=tools, tool_choice="required")
        assert guide is not None
        for text in (one, f"{one}\n{now}", call('odd \\"name\\" 名', '{"free": [1]}')):
            assert takes(api, guide, text), text
        for text in (
            "",
            "Hello",
            f"Hello\n{one}",
            call("sum", "{}"),
            call("now", '{"x": 1}'),
            call("x", "{}"),
        ):
            assert not takes(api, guide, text), text
        guide = await guide_of(api, tools=tools, tool_choice="required", parallel_tool_calls=False)
        assert guide is not None and takes(api, guide, one) and not takes(api, guide, f"{one}\n{now}")
        guide = await guide_of(api, tools=tools, tool_choice="required", guided_json=PERSON)
        assert (
            guide is not None and takes(api, guide, one) and not takes(api, guide, '{"name": "A", "age": 1}')
        )
        named = {"type": "function", "function": {"name": "now"}}
        guide = await guide_of(api, tools=tools, tool_choice=named)
        assert guide is not None and takes(api, guide, now) and not takes(api, guide, one)


async def test_strict_functions_have_right_arguments_when_they_are_called() -> None:
    tools = [tool("sum", parameters=NUMBER, strict=True)]
    async with running_api(say("ok"), tool_tokens=True) as api:
        guide = await guide_of(api, tools=tools)
        assert guide is not None
        for text in ("Just words, { \n", call("sum", '{"n": 1}'), "Words.\n" + call("sum", '{"n": 1}')):
            assert takes(api, guide, text), text
        assert not takes(api, guide, call("sum", '{"n": "1"}'))


async def test_with_tools_an_answer_is_a_call_or_has_the_form() -> None:
    async with running_api(say("ok"), tool_tokens=True) as api:
        guide = await guide_of(api, tools=TOOLS, guided_json=PERSON)
        assert guide is not None
        assert takes(api, guide, SUM) and takes(api, guide, '{"name": "A", "age": 1}')
        assert not takes(api, guide, "words")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (json_schema(None), "response_format.json_schema.schema"),
        (json_schema({"type": "nonsense"}), "response_format.json_schema.schema"),
        (json_schema({"type": "string", "pattern": "("}), "response_format.json_schema.schema"),
        (json_schema({"$ref": "https://example.com/schema"}), "response_format.json_schema.schema"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"guided_json": {"x-guidance": 5, "type": 7}}, "guided_json"),
        ({"guided_json": {"allOf": COSTLY}}, "guided_json"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["x"] * 1025}, "guided_choice"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"structural_tag": {}}, "structural_tag"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"guided_regex": "a" * MAX_CHARACTERS}, "guided_regex"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("route", ["chat", "completions"])
async def test_a_form_that_cannot_be_kept_is_refused_by_name(
    route: str, fields: dict[str, Any], param: str
) -> None:
    async with running_api() as api:
        status, body, _ = await (api.chat(**fields) if route == "chat" else api.complete(**fields))
        assert (status, body["error"]["param"]) == (400, param), body
        assert len(body["error"]["message"]) < 600, body
        api.assert_nothing_open()


async def test_a_grammar_of_ones_own_and_tools_exclude_each_other() -> None:
    async with running_api() as api:
        status, body, _ = await api.chat(tools=TOOLS, guided_grammar='start: "a"')
    assert (status, body["error"]["param"]) == (400, "guided_grammar")


@pytest.mark.parametrize("depth", [100, 5000])
async def test_deep_schemas_break_nothing(depth: int) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    text = '{"messages": [{"role": "user", "content": "x"}], "guided_json": %s}'
    nested = '{"type": "array", "items": ' * depth + "{}" + "}" * depth
    async with running_api(say("ok")) as api:
        async with api.http.post(f"{api.url}/v1/chat/completions", data=text % nested) as answer:
            assert answer.status in (200, 400), await answer.text()
        assert (await api.chat())[0] == 200

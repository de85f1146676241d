"""Wrong requests: a 4xx with the field's path, never a 500 and never the engine's problem."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from api.params import MAX_CHOICES
from api.schema import ChatRequest, CompletionRequest, GenerationRequest
from tests.api.builders import Api, running_api
from tests.api.fakes import say
from tests.conftest import Rand

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BASES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    TEXT: {"prompt": "Hi", "max_tokens": 4},
}
# One value of each JSON type, and some that break careless code.
WRONG: list[Any] = [
    True, 3, -1, 0, 2**70, -(2**70), 1.5, -0.0, 1e300, "", "x", "\0", "ü" * 50, [], [[]], [None], [1], ["x"],
    [1, "x"], {}, {"a": 1}, {"type": "x"}, {"type": 5}, [{"role": "user"}], [{"role": 5}], [{}],
]  # fmt: skip


DEEP = b'{"a":' * 5000 + b"1" + b"}" * 5000


def fields_of(route: str) -> list[str]:
    kind: type[GenerationRequest] = ChatRequest if route == CHAT else CompletionRequest
    return [field.encode_name for field in msgspec.structs.fields(kind)]


async def assert_refused_or_served(api: Api, route: str, body: dict[str, Any], name: str) -> None:
    async with api.http.post(api.url + route, json=body) as answer:
        text = await answer.text()
    if answer.status == 200:
        return
    assert answer.status in (400, 404), (body, text)
    error = msgspec.json.decode(text)["error"]
    assert error["param"] is not None, (body, error)
    assert error["param"].split(".")[0].split("[")[0] in {name, *BASES[route]}, (body, error)
    assert error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("route", [CHAT, TEXT])
async def test_no_value_of_any_field_breaks_the_server(route: str) -> None:
    async with running_api(say("ok", logprobs=True)) as api:
        for name in fields_of(route):
            for value in WRONG:
                await assert_refused_or_served(api, route, {**BASES[route], name: value}, name)
        api.assert_nothing_open()


@pytest.mark.parametrize("route", [CHAT, TEXT])
async def test_random_pairs_of_odd_fields_break_nothing(route: str, rand: Rand) -> None:
    names = fields_of(route)
    async with running_api(say("ok", logprobs=True)) as api:
        for _ in range(200):
            odd = {name: rand.python.choice(WRONG) for name in rand.python.sample(names, 2)}
            async with api.http.post(api.url + route, json={**BASES[route], **odd}) as answer:
                assert answer.status in (200, 400, 404), (odd, await answer.text())
        api.assert_nothing_open()


@pytest.mark.parametrize("route", [CHAT, TEXT])
async def test_every_typed_field_refuses_another_type_with_its_path(route: str) -> None:
    wrong = {"messages": 5, "prompt": {"a": 1}, "tools": 5}
    async with running_api() as api:
        for name in fields_of(route):
            value = wrong.get(name, [{"not": ["this"]}])
            status, body, _ = await api.post(route, {**BASES[route], name: value})
            assert status == 400, (name, body)
            assert body["error"]["param"].split("[")[0].split(".")[0] == name, (name, body)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("top_p", -0.1), ("top_p", 1.1), ("top_k", -2),
        ("min_p", 1.1), ("top_k", 2**63), ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
        ("repetition_penalty", 0), ("repetition_penalty", 11), ("n", 0), ("n", MAX_CHOICES + 1),
        ("max_tokens", 0), ("max_tokens", 2**63),
        ("min_tokens", -1), ("seed", 2**63), ("stop_token_ids", [10**6]), ("stop_token_ids", [0] * 1025),
        ("logit_bias", {"5": 1.0}), ("response_format", {"type": "yaml"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("route", [CHAT, TEXT])
async def test_values_out_of_range_are_refused_by_name(route: str, field: str, value: Any) -> None:
    async with running_api() as api:
        status, body, _ = await api.post(route, {**BASES[route], field: value})
    assert status == 400 and body["error"]["param"].split("[")[0] == field, body


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].image_url.url",
        ),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"metadata": {"min_tokens": "5"}}, "metadata.min_tokens"),
        ({"prompt_token_ids": [72, -1]}, "prompt_token_ids[1]"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
    ],
)
async def test_chat_names_the_path_of_what_is_wrong(fields: dict[str, Any], param: str) -> None:
    async with running_api() as api:
        status, body, _ = await api.post(CHAT, {**BASES[CHAT], **fields})
    assert (status, body["error"]["param"]) == (400, param), body


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of"), ({"echo": True, "logprobs": 1}, "echo")],
)
async def test_completions_name_what_is_not_supported(fields: dict[str, Any], param: str) -> None:
    async with running_api() as api:
        status, body, _ = await api.post(TEXT, {**BASES[TEXT], **fields})
    assert (status, body["error"]["param"], body["error"]["code"]) == (400, param, "unsupported_value")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b"null", b'{"messages":', b"\xff\xfe", b'{"n": NaN}', DEEP],
)  # fmt: skip
async def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    async with running_api() as api, api.http.post(api.url + CHAT, data=body) as answer:
        error = (await answer.json())["error"]
    assert answer.status == 400 and error["code"] in ("invalid_json", "invalid_type")


async def test_unknown_fields_are_accepted_and_named_in_a_header() -> None:
    async with running_api(say("ok")) as api:
        status, _, headers = await api.chat(**{"guided_wish": {}, "odd\r\nname": 1, "später": 2})
    assert status == 200
    assert headers["X-Octet-Warning"] == (
        "unknown fields ignored: 'guided_wish', 'odd\\r\\nname', 'sp\\xe4ter'"
    )


async def test_known_fields_bring_no_warning() -> None:
    async with running_api(say("ok")) as api:
        _, _, headers = await api.chat(user="me", store=False, parallel_tool_calls=True, verbosity="low")
    assert "X-Octet-Warning" not in headers


@pytest.mark.parametrize("route", [CHAT, TEXT])
async def test_a_prompt_beyond_the_context_has_openais_code(route: str) -> None:
    long = "x" * 200
    body = {"messages": [{"role": "user", "content": long}], "prompt": long}
    async with running_api(context=100) as api:
        status, answer, _ = await api.post(route, body)
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    assert answer["error"]["param"] == ("messages" if route == CHAT else "prompt")


async def test_tools_are_rendered_unless_the_choice_is_none() -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    async with running_api(say("ok")) as api:
        await api.chat(tools=[tool])
        await api.chat(tools=[tool], tool_choice="none")
        with_tool, without = (bytes(i for i in r.prompt_token_ids if i < 256) for r in api.engine.added)
    assert b"look_up" in with_tool and b"look_up" not in without

"""Answers of a given form from a whole server whose model talks nonsense: the form holds nevertheless.

Many at once, with too few KV blocks for all, so that sequences are preempted in the middle of their grammar.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.server import Server, running_server

pytestmark = pytest.mark.e2e

WORD = {"type": "string", "pattern": "^[a-z]{12,16}$"}
SHAPE = {
    "type": "object",
    "properties": {"word": WORD, "numbers": {"type": "array", "items": {"type": "integer", "minimum": 0,
                   "maximum": 9}, "minItems": 6, "maxItems": 8}, "other": WORD},
    "required": ["word", "numbers", "other"],
    "additionalProperties": False,
}  # fmt: skip
FORM = {"type": "json_schema", "json_schema": {"name": "shape", "schema": SHAPE}}
TOOL = {"type": "function", "function": {"name": "note", "parameters": SHAPE}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(
        tmp_path_factory.mktemp("forms"), "--kv-cache-memory", "3MiB", "--block-size", "16",
        "--max-model-len", "512",
    ) as server:  # fmt: skip
        yield server


def ask(server: Server, seed: int, **fields: Any) -> Any:
    """The choice of a sampled answer; its prompt is nobody else's."""
    answer = server.client(timeout=240).chat.completions.create(
        model="octet",
        messages=[{"role": "user", "content": f"Note number {seed}."}],
        seed=seed,
        temperature=1.5,
        max_tokens=400,
        **fields,
    )
    return answer.choices[0]


def assert_fits(value: Any) -> None:
    assert list(value) == ["word", "numbers", "other"], value
    assert 12 <= len(value["word"]) <= 16 and 6 <= len(value["numbers"]) <= 8, value


def test_answers_keep_their_form_and_their_words_though_some_are_preempted(server: Server) -> None:
    with ThreadPoolExecutor(16) as pool:
        choices = list(pool.map(lambda seed: ask(server, seed, response_format=FORM), range(16)))
    for choice in choices:
        assert choice.finish_reason == "stop", choice
        assert_fits(json.loads(choice.message.content))
    assert server.metric("octet:preemptions_total") > 0, "there was room for all: nothing was proven"
    for seed in (0, 7, 15):
        alone = ask(server, seed, response_format=FORM)
        assert alone.message.content == choices[seed].message.content, seed


@pytest.mark.parametrize("thinking", [False, True])
def test_required_calls_come_with_right_arguments_streamed_and_whole(server: Server, thinking: bool) -> None:
    fields: dict[str, Any] = {
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "logprobs": False,
        "extra_body": {"enable_thinking": thinking, "stop_token_ids": []},
    }
    whole = ask(server, 50, **fields)
    if whole.finish_reason == "length":
        assert thinking and not whole.message.content, "only reasoning may take all tokens"
        return
    (call,) = whole.message.tool_calls
    assert (call.function.name, whole.finish_reason) == ("note", "tool_calls")
    assert_fits(json.loads(call.function.arguments))
    seen = [chunk.choices[0] for chunk in stream(server, 50, **fields)]
    (streamed,) = [call for choice in seen for call in choice.delta.tool_calls or []]
    assert streamed.function.arguments == call.function.arguments
    assert seen[-1].finish_reason == "tool_calls"


def stream(server: Server, seed: int, **fields: Any) -> list[Any]:
    chunks = server.client(timeout=240).chat.completions.create(
        model="octet",
        messages=[{"role": "user", "content": f"Note number {seed}."}],
        seed=seed,
        temperature=1.5,
        max_tokens=400,
        stream=True,
        **fields,
    )
    return list(chunks)

"""The demo model answers right: one sample of each skill, in both formats, on one rank and on eight.

A wrong rotation, a swapped expert pool or a broken chunk border shows here as a wrong answer. What the model
cannot do is listed in demo_samples.json under not_yet, and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from models.demo_training.skills import SKILLS
from models.demo_training.wire import chat_request, written_text
from tests.e2e.demo import (
    DEMO,
    SETUPS,
    Setup,
    ask,
    ask_all,
    draw,
    is_answered,
    model_digest,
    read_chosen,
)
from tests.e2e.server import Server, running_server

pytestmark = pytest.mark.e2e

CHOSEN = read_chosen()
ASKED = list(CHOSEN.right)
STREAMED = [skill for skill in ("shapes", "thinking", "tools", "json") if skill in ASKED] or ASKED[:1]


class Served:
    """A running setup and what it answered to the chosen samples, all asked at once."""

    def __init__(self, setup: Setup, server: Server) -> None:
        self.setup, self.server = setup, server
        self.samples = {skill: draw(skill, index) for skill, index in CHOSEN.right.items()}
        answers = ask_all(server.address, list(self.samples.values()))
        self.choices = dict(zip(self.samples, answers, strict=True))


@pytest.fixture(scope="module", params=SETUPS, ids=lambda setup: setup.name)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    setup: Setup = request.param
    with running_server(tmp_path_factory.mktemp(setup.name), "--model", str(DEMO), *setup.flags) as server:
        yield Served(setup, server)


def test_every_skill_is_asked_or_openly_listed_as_not_possible_yet() -> None:
    listed = [*CHOSEN.right, *CHOSEN.not_yet]
    assert sorted(listed) == sorted(SKILLS), "run `python -m tests.e2e.choose_demo_samples`"


def test_the_samples_were_chosen_for_these_weights() -> None:
    assert CHOSEN.model == model_digest(), (
        "models/demo has other weights than those that demo_samples.json was chosen for; "
        "run `python -m tests.e2e.choose_demo_samples` and look at what it lists under not_yet"
    )


@pytest.mark.parametrize("skill", ASKED)
def test_a_sample_of_the_skill_is_answered_right(served: Served, skill: str) -> None:
    sample, choice = served.samples[skill], served.choices[skill]
    written = written_text(choice["message"])
    assert is_answered(sample, choice), (
        f"{skill} {CHOSEN.right[skill]} in {served.setup.name}: {written!r}, expected {sample.answer!r}"
    )


def test_an_answer_is_the_same_bits_alone_as_among_the_others(served: Served) -> None:
    for skill in ASKED[:3]:
        alone = ask(served.server.address, served.samples[skill])
        assert alone["logprobs"] == served.choices[skill]["logprobs"], (skill, served.setup.name)


def test_streamed_and_whole_messages_are_equal(served: Served) -> None:
    for skill in STREAMED:
        body = chat_request(served.samples[skill], "octet-demo")
        extra = {"chat_template_kwargs": body.pop("chat_template_kwargs")}
        with served.server.client().chat.completions.stream(**body, extra_body=extra) as events:
            choice = events.get_final_completion().choices[0]
        whole = served.choices[skill]
        assert plain(choice.message.model_dump()) == plain(whole["message"]), skill
        assert choice.finish_reason == whole["finish_reason"], skill


def plain(message: dict[str, Any]) -> tuple[Any, ...]:
    """What a client reads of a message; ids of calls are drawn anew each time."""
    calls = [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message.get("tool_calls") or []
    ]
    return message.get("reasoning_content") or "", message["content"] or "", calls


def test_reasoning_comes_apart_from_the_answer(served: Served) -> None:
    sample = draw("thinking", CHOSEN.right.get("thinking", 0))
    choice = ask(served.server.address, sample)
    reasoning, content = choice["message"].get("reasoning_content") or "", choice["message"]["content"]
    assert "think>" not in reasoning + content and not content.startswith("\n")
    assert reasoning.strip(), "thinking was asked for"
    assert "thinking" not in ASKED or content, choice


def test_a_required_call_is_made_sure_of_and_is_the_one_that_the_model_makes_freely(served: Served) -> None:
    sample = draw("tools", CHOSEN.right.get("tools", 0))
    offered = {tool["function"]["name"] for tool in sample.tools}
    sure = ask(served.server.address, sample, tool_choice="required", max_tokens=300)
    if sure["finish_reason"] == "length":
        assert "tools" not in ASKED, "a model that can call does not write until its tokens are used up"
        return
    calls = plain(sure["message"])[2]
    assert calls and {name for name, _ in calls} <= offered and sure["finish_reason"] == "tool_calls"
    assert "tools" not in ASKED or calls == plain(served.choices["tools"]["message"])[2]


def test_an_answer_keeps_to_a_schema_that_the_model_never_saw(served: Served) -> None:
    shape = {
        "type": "object",
        "properties": {"first": {"enum": ["red", "green", "blue"]}, "second": {"type": "boolean"}},
        "required": ["first", "second"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": shape}}
    sample = served.samples[ASKED[0]]
    for thinks in (False, True):
        choice = ask(
            served.server.address,
            sample,
            response_format=form,
            max_tokens=400,
            chat_template_kwargs={"enable_thinking": thinks},
        )
        if choice["finish_reason"] == "stop":
            assert set(json.loads(choice["message"]["content"])) == {"first", "second"}
        assert choice["finish_reason"] == "stop" or thinks, choice  # reasoning may take all the tokens

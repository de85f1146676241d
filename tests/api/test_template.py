"""The exact prompt strings of ERNIE's templates, and what a template may not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from api.template import ChatTemplate, load_template
from engine.errors import ConfigError, RequestError

ON, OFF = "<think>", "<think>\n\n</think>\n\n"
BEGIN, SEP = "<|begin_of_sentence|>", "<|end_of_sentence|>"
IMAGE = "<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>"
VIDEO = "<|VIDEO_START|><|video@placeholder|><|VIDEO_END|>"
PICTURE, CLIP = {"type": "image_url"}, {"type": "video_url"}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Wetter für 城市 <now>"}}
TOOL_TEXT = '{"type": "function", "function": {"name": "weather", "description": "Wetter für 城市 <now>"}}'


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "東京"}}}
CALL_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "東京"}}\n</tool_call>'
CASES = {
    "text": ([user("Hi")], f"{BEGIN}User: Hi\nAssistant: "),
    "system": ([system("SYS"), user("Hi")], f"{BEGIN}SYS\nUser: Hi\nAssistant: "),
    "turns": (
        [user("A"), assistant("B"), user("C")],
        f"{BEGIN}User: A\nAssistant: B{SEP}User: C\nAssistant: ",
    ),
    "reasoning": (
        [user("A"), assistant("B", reasoning_content="R"), user("C")],
        f"{BEGIN}User: A\nAssistant: <think>\nR\n</think>\nB{SEP}User: C\nAssistant: ",
    ),
    "image first": (
        [user(PICTURE, text("Describe."))],
        f"{BEGIN}User: Picture 1:{IMAGE}Describe.\nAssistant: ",
    ),
    "text first": (
        [user(text("Describe."), PICTURE)],
        f"{BEGIN}User: Describe.Picture 1:{IMAGE}\nAssistant: ",
    ),
    "two images": (
        [user(PICTURE, PICTURE, text("Compare."))],
        f"{BEGIN}User: Picture 1:{IMAGE}Picture 2:{IMAGE}Compare.\nAssistant: ",
    ),
    "image in the second turn": (
        [user(PICTURE), assistant("B"), user(PICTURE)],
        f"{BEGIN}User: Picture 1:{IMAGE}\nAssistant: B{SEP}User: Picture 2:{IMAGE}\nAssistant: ",
    ),
    "video": (
        [user(CLIP, text("What happens?"))],
        f"{BEGIN}User: Video 1:{VIDEO}What happens?\nAssistant: ",
    ),
    "image and video": (
        [user(CLIP, PICTURE)],
        f"{BEGIN}User: Video 1:{VIDEO}Picture 1:{IMAGE}\nAssistant: ",
    ),
    "tool call and results": (
        [
            user("A"),
            assistant("", tool_calls=[CALL, CALL]),
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
        ],
        f"{BEGIN}User: A\nAssistant: {CALL_TEXT}\n{CALL_TEXT}{SEP}"
        "User: <tool_output>\n1\n</tool_output>\n<tool_output>\n2\n</tool_output>\n\nAssistant: ",
    ),
}


@pytest.fixture(scope="module")
def vl() -> ChatTemplate:
    return load_template("", "no-such-folder", "vl")


@pytest.mark.parametrize("case", CASES)
def test_vision_prompts_match_the_published_strings(vl: ChatTemplate, case: str) -> None:
    messages, expected = CASES[case]
    assert vl.render(messages) == expected + OFF
    assert vl.render(messages, None, {"enable_thinking": False}) == expected + OFF
    assert vl.render(messages, None, {"enable_thinking": True}) == expected + ON


@pytest.mark.parametrize("case", ["text", "system", "turns", "tool call and results"])
def test_text_models_get_the_same_prompt_without_a_thinking_tail(case: str) -> None:
    messages, expected = CASES[case]
    assert load_template("", "no-such-folder", "text").render(messages) == expected


def test_tools_are_listed_at_the_end_of_the_system_message(vl: ChatTemplate) -> None:
    listed = f"\n<tool_list>\n[{TOOL_TEXT}, {TOOL_TEXT}]\n</tool_list>\n"
    assert vl.render([system("SYS"), user("Hi")], [TOOL, TOOL]) == (
        f"{BEGIN}SYS{listed}\nUser: Hi\nAssistant: {OFF}"
    )
    assert vl.render([user("Hi")], [TOOL, TOOL]) == f"{BEGIN}{listed}\nUser: Hi\nAssistant: {OFF}"


def test_whitespace_of_the_client_survives(vl: ChatTemplate) -> None:
    assert "User:  a\n\n\tb \n\nAssistant" in vl.render([user(" a\n\n\tb \n")])


@pytest.mark.parametrize(
    "name, content",
    [
        ("chat_template.jinja", "own {{ messages[0].content }}"),
        ("chat_template.json", '{"chat_template": "own {{ messages[0].content }}"}'),
        ("tokenizer_config.json", '{"chat_template": "own {{ messages[0].content }}"}'),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "rag", "template": "no"},'
            ' {"name": "default", "template": "own {{ messages[0].content }}"}]}',
        ),
    ],
)
def test_the_checkpoints_template_is_used(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert load_template("", tmp_path, "vl").render([user("Hi")]) == "own Hi"


def test_the_operators_file_wins(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("checkpoint")
    (tmp_path / "mine").write_text("mine{{ bos_token }}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    assert load_template(str(tmp_path / "mine"), tmp_path, "vl").render([user("Hi")]) == "mine<s>"
    with pytest.raises(ConfigError, match="not a file"):
        load_template(str(tmp_path / "none"), tmp_path, "vl")


def test_a_template_that_is_no_jinja_stops_the_server() -> None:
    with pytest.raises(ConfigError, match="not valid Jinja"):
        ChatTemplate("{% for %}", "here")


def test_a_refusal_of_the_template_reaches_the_client() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", "here")
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        template.render([user("Hi")])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ range(10 ** 9) | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_the_sandbox_forbids_is_a_request_error_without_details(source: str) -> None:
    with pytest.raises(RequestError, match="cannot render these messages") as caught:
        ChatTemplate(source, "here").render([user("Hi")])
    assert "class" not in caught.value.message


def test_output_and_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = ChatTemplate(
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "h"
    )
    with pytest.raises(RequestError, match="exceeds 1000 characters"):
        endless.render([], max_characters=1000)
    monkeypatch.setattr("api.template._MAX_SECONDS", 0.05)
    with pytest.raises(RequestError, match="took more than"):
        endless.render([], max_characters=1 << 40)


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "__class__"])
def test_template_kwargs_cannot_replace_what_the_server_sets(vl: ChatTemplate, name: str) -> None:
    with pytest.raises(RequestError, match="set by the server") as caught:
        vl.render([user("Hi")], None, {name: []})
    assert caught.value.param == f"chat_template_kwargs.{name}"

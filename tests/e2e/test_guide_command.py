"""The guide's command on eight ranks at wint4, driven with the real openai package."""

from __future__ import annotations

import random
import threading

import openai
import pytest

from tests.e2e.media import image_part, video_part
from tests.e2e.server import Server, await_true, listening_ports

pytestmark = pytest.mark.e2e


def ask(server: Server, *parts: object, **options: object) -> openai.types.chat.ChatCompletion:
    """One greedy chat completion of a few tokens about `parts`."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    options = {"max_tokens": 8, "temperature": 0, **options}
    messages = [{"role": "user", "content": content}]
    return server.client().chat.completions.create(model="octet", messages=messages, **options)  # type: ignore


def test_ready_line_says_how_to_send_a_first_request(guide_server: Server) -> None:
    await_true(lambda: "ready after" in guide_server.log, 5, "the ready line is printed")
    [line] = [line for line in guide_server.log.splitlines() if "ready after" in line]
    assert guide_server.address in line
    assert "curl" in line and "wint4" in line and "8 ranks" in line


def test_text_is_answered(guide_server: Server) -> None:
    answer = ask(guide_server, "What is Octet?")
    assert answer.usage is not None and answer.usage.completion_tokens == 8
    assert answer.choices[0].finish_reason == "length"


def test_one_image_is_counted_in_the_usage(guide_server: Server) -> None:
    usage = ask(guide_server, image_part(), "Describe the picture.").usage
    # 160 x 120 becomes 168 x 112: 12 x 8 patches, a quarter as many tokens.
    assert usage is not None and usage.prompt_tokens_details.image_tokens == 24  # type: ignore[union-attr]


def test_another_image_changes_the_answer(guide_server: Server) -> None:
    first, second = (ask(guide_server, image_part(seed), "Describe.", logprobs=True) for seed in (0, 3))
    assert first.choices[0].logprobs != second.choices[0].logprobs


def test_two_images_of_different_sizes_are_answered(guide_server: Server) -> None:
    usage = ask(guide_server, image_part(0), image_part(1, 84, 112), "What differs?").usage
    assert usage is not None and usage.prompt_tokens_details.image_tokens == 24 + 12  # type: ignore[union-attr]


def test_video_is_answered(guide_server: Server) -> None:
    usage = ask(guide_server, video_part(), "What moves?").usage
    assert usage is not None and usage.prompt_tokens_details.video_tokens > 0  # type: ignore[union-attr]


def test_stream_adds_up_to_the_whole_answer(guide_server: Server) -> None:
    whole = ask(guide_server, image_part(), "Describe the picture.", max_tokens=24)
    stream = ask(
        guide_server,
        image_part(),
        "Describe the picture.",
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)  # type: ignore[attr-defined]
    assert text == (whole.choices[0].message.content or "")
    assert chunks[-1].usage == whole.usage  # type: ignore[attr-defined]


def test_thinking_on_gives_reasoning_and_off_gives_content(guide_server: Server) -> None:
    thinking = ask(guide_server, "Why?", extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    plain = ask(guide_server, "Why?", extra_body={"enable_thinking": False})
    assert thinking.choices[0].message.reasoning_content  # type: ignore[attr-defined]
    assert not getattr(plain.choices[0].message, "reasoning_content", None)


def test_bad_media_is_a_400_that_names_the_part(guide_server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(guide_server, {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,AAAA"}}, "?")
    assert caught.value.param == "messages[0].content[0].image_url"


def test_exactly_two_tcp_ports_listen(guide_server: Server) -> None:
    assert listening_ports(guide_server.tree()) == {guide_server.port, guide_server.metrics_port}


def test_health_runs_through_the_ranks(guide_server: Server) -> None:
    assert [guide_server.get(path)[0] for path in ("/health", "/ready", "/live")] == [200, 200, 200]


def test_random_cancels_among_64_streams_leave_nothing_behind(guide_server: Server) -> None:
    picker = random.Random(0)
    failures: list[BaseException] = []

    def converse(keep: int) -> None:
        try:
            with guide_server.client(timeout=240) as client:
                stream = client.chat.completions.create(
                    model="octet",
                    messages=[{"role": "user", "content": "Tell me a long story."}],
                    max_tokens=24,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                with stream:
                    for count, _ in enumerate(stream):
                        if count == keep:
                            return
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=converse, args=(picker.choice([0, 2, 6, 99]),)) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[:3]
    await_true(lambda: guide_server.metric("octet:kv_blocks_used") == 0, 20, "all KV blocks free")
    assert guide_server.metric("octet:num_requests_running") == 0
    assert guide_server.metric("octet:num_requests_waiting") == 0

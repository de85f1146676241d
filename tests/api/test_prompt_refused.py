"""Messages that cannot become a prompt: each is named by its path, and nothing is loaded or left behind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from engine.errors import RequestError
from tests.api.media_builders import until
from tests.api.prompt_builders import BEGIN, World, clip, image_span, picture, text, user, video_span


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_text_model_refuses_pictures(tmp_path: Path) -> None:
    world = World(tmp_path, family="text")
    error = world.refusal(user(text("a"), picture("6")))
    assert error.param == "messages[0].content[1].image_url" and "text only" in error.message
    assert world.chat(user(text("a"), text("b"))).token_ids == world.ids(BEGIN, "User: ab\nAssistant: ")


@pytest.mark.parametrize(
    "message, param",
    [
        ({"role": "robot", "content": "a"}, "messages[1].role"),
        ({"content": "a"}, "messages[1].role"),
        ("a", "messages[1]"),
        ({"role": "user", "content": 3}, "messages[1].content"),
        (user(text("a"), {"type": "audio"}), "messages[1].content[1].type"),
        (user(text("a"), "b"), "messages[1].content[1].type"),
        (user(text("a"), {"type": "text"}), "messages[1].content[1].text"),
        (user(text("a"), {"type": "image_url"}), "messages[1].content[1].image_url"),
        (
            user(text("a"), {"type": "video_url", "video_url": {"uri": "x"}}),
            "messages[1].content[1].video_url",
        ),
        ({"role": "system", "content": [picture("6")]}, "messages[1].content"),
        ({"role": "assistant", "content": "a", "tool_calls": [{}]}, "messages[1].tool_calls[0].function"),
        ({"role": "assistant", "content": "a", "reasoning_content": 1}, "messages[1].reasoning_content"),
    ],
)
def test_a_malformed_message_is_named_by_its_path(world: World, message: Any, param: str) -> None:
    error = world.refusal(user("Hi"), message)
    assert (error.status, error.param) == (400, param)


def test_no_messages_is_an_error(world: World) -> None:
    assert world.refusal().param == "messages"


def test_too_many_images_name_the_limit_and_load_nothing(world: World) -> None:
    error = world.refusal(user(*[picture("6")] * 6))
    assert error.param == "messages[0].content[5].image_url"
    assert "at most 5" in error.message and "--limit-mm-per-prompt" in error.message
    assert "at most 2" in world.refusal(user(*[clip("6")] * 3)).message
    assert world.media.wishes == []


def test_options_of_request_and_item_reach_the_loader(world: World) -> None:
    options = {"mm_processor_kwargs": {"video_fps": 1}}
    world.chat(user(clip("8", fps=3.0, detail="high")), options=options)
    assert world.media.wishes == [({"video_fps": 1}, {"fps": 3.0})]


def test_one_bad_image_undoes_the_others(world: World) -> None:
    error = world.refusal(user(picture("6"), picture("slow"), picture("bad"), picture("4")))
    assert error.param == "messages[0].content[2].image_url"
    assert world.media.files == set() and world.media.num_running == 0


def test_a_cancelled_build_leaves_nothing_behind(world: World) -> None:
    async def run() -> None:
        task = asyncio.create_task(world.builder.build_chat([user(picture("6"), picture("slow"))]))
        await until(lambda: world.media.num_running and world.media.files)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert world.media.files == set() and world.media.num_running == 0


def test_media_beyond_the_context_are_refused(tmp_path: Path) -> None:
    world = World(tmp_path, context=300)
    error = world.refusal(user(picture("100"), picture("100"), picture("100")))
    assert error.code == "context_length_exceeded" and world.media.files == set()


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path, context=64)
    error = world.refusal(user("dog " * 200))
    assert error.code == "context_length_exceeded" and "64" in error.message
    error = world.refusal(user("x" * 100_000))
    assert error.code == "context_length_exceeded" and "100" in error.message


def test_release_deletes_the_files_once(world: World) -> None:
    prompt = world.chat(user(picture("6")))
    assert len(world.media.files) == 1
    prompt.release()
    prompt.release()
    assert world.media.files == set()


@pytest.mark.parametrize(
    "token_ids, param", [([], "prompt"), ([1, -1], "prompt[1]"), ([1, 10**7], "prompt[1]")]
)
def test_token_ids_outside_the_vocabulary_are_named(world: World, token_ids: list[int], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        world.builder.build_text(token_ids)
    assert caught.value.param == param


def test_ready_token_ids_take_their_media_from_the_messages(world: World) -> None:
    token_ids = world.ids(BEGIN, *image_span(1, 6), *video_span(1, 8), "Go", "<think>")
    messages = [user(picture("6"), clip("8"))]
    prompt = asyncio.run(world.builder.build_tokens(token_ids, messages))
    assert prompt.token_ids == token_ids and prompt.thinking_open
    start = token_ids.index(world.model.video_start_id) + 1
    assert [item.offset for item in prompt.media] == [token_ids.index(world.model.image_patch_id), start]


@pytest.mark.parametrize(
    "spans, parts",
    [
        ([image_span(1, 6)], []),
        ([], [picture("6")]),
        ([image_span(1, 6)], [picture("6"), picture("6")]),
        ([image_span(1, 5)], [picture("6")]),
        ([image_span(1, 6)], [clip("6")]),
        ([video_span(1, 6)], [picture("6")]),
    ],
)
def test_placeholders_that_do_not_fit_the_media_are_a_400(world: World, spans: Any, parts: Any) -> None:
    token_ids = world.ids("Hi", *[segment for span in spans for segment in span])
    with pytest.raises(RequestError) as caught:
        asyncio.run(world.builder.build_tokens(token_ids, [user(*parts)] if parts else []))
    assert caught.value.status == 400 and str(caught.value.param).startswith("prompt_token_ids")
    assert world.media.files == set()

"""A prompt builder over a trained tokenizer and media that are sizes only, and short names for messages."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from api.media.loader import LoadedMedia, MediaPart
from api.prompt import Prompt, PromptBuilder
from api.template import ChatTemplate, load_template
from api.tokenizer import Tokenizer
from engine.config import ServerConfig
from engine.errors import RequestError
from tests.api.builders import make_model
from tests.api.tokenizer_builders import make_tokenizer


class SizedMedia:
    """A loader whose URLs say how many tokens they take; "bad" fails, "slow" never ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.wishes: list[Any] = []
        self.num_running = 0

    async def load(
        self, part: MediaPart, request_kwargs: dict[str, Any] | None = None, max_tokens: int = 1 << 31
    ) -> LoadedMedia:
        self.wishes.append((request_kwargs, part.kwargs))
        await asyncio.sleep(0)
        if part.url == "bad":
            raise RequestError("The image is bad.", param=part.param)
        if part.url == "slow":
            self.num_running += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.num_running -= 1
        name = f"{len(self.wishes)}-{part.url}"
        (self.folder / name).touch()
        return LoadedMedia(part.kind, part.url, (1, 2, 2 * int(part.url)), int(part.url), name)

    def drop(self, file: str) -> None:
        (self.folder / file).unlink(missing_ok=True)

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


class World:
    """A prompt builder over a trained tokenizer."""

    def __init__(self, folder: Path, *, context: int = 4096, template: str = "", family: str = "vl") -> None:
        self.tokenizer: Tokenizer = make_tokenizer(folder / "tokenizer")
        self.model = make_model(self.tokenizer, context=context, family=family)
        self.media = SizedMedia(folder / "media")
        config = ServerConfig(limit_mm_per_prompt={"image": 5, "video": 2})
        chosen = ChatTemplate(template, "test") if template else load_template("", folder, family)
        self.builder = PromptBuilder(config, self.model, self.tokenizer, chosen, self.media)  # type: ignore[arg-type]

    def chat(self, *messages: Any, **more: Any) -> Prompt:
        return asyncio.run(self.builder.build_chat(list(messages), **more))

    def refusal(self, *messages: Any, **more: Any) -> RequestError:
        with pytest.raises(RequestError) as caught:
            self.chat(*messages, **more)
        return caught.value

    def ids(self, *segments: str | int) -> list[int]:
        """Plain strings are text; `<|...|>` and think tags are tokens; ints are that many placeholders."""
        token_ids: list[int] = []
        for segment in segments:
            if isinstance(segment, int):
                token_ids += [self.model.image_patch_id] * segment
            elif segment in self.tokenizer.markers:
                token_ids.append(self.tokenizer.markers[segment])
            else:
                token_ids += self.tokenizer.encode(segment)
        return token_ids


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def picture(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def clip(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url, **more}}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


OPEN, CLOSED = ("<think>",), ("<think>", "\n\n", "</think>", "\n\n")
BEGIN, SEP = "<|begin_of_sentence|>", "<|end_of_sentence|>"


def image_span(number: int, size: int, before: str = "") -> tuple[str | int, ...]:
    return (f"{before}Picture {number}:", "<|IMAGE_START|>", size, "<|IMAGE_END|>")


def video_span(number: int, size: int, before: str = "") -> tuple[str | int, ...]:
    return (f"{before}Video {number}:", "<|VIDEO_START|>", size, "<|VIDEO_END|>")

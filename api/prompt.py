"""A request's messages or text, made into token ids and media ready for the engine.

The template writes one mark per image and video; each becomes as many placeholders as its size needs.
Fetching and decoding is in media/, the text of templates in template.py and templates/.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from api.conversation import Conversation, read_conversation
from api.markers import REASONING_MARKERS, STRUCTURE_MARKERS, Guard, MarkerScanner, strings_of
from api.media.loader import LoadedMedia, MediaLoader, MediaPart
from api.template import ChatTemplate, check_template_kwargs
from api.tokenizer import Tokenizer
from engine.config import ServerConfig
from engine.errors import RequestError
from engine.messages import MediaItem
from engine.model_config import ModelConfig

_MARKS = {"<|image@placeholder|>": "image", "<|video@placeholder|>": "video"}
_THINK, _THINK_END = REASONING_MARKERS
_ENCODE_IN_PLACE = 1 << 14  # characters; longer texts are encoded in a thread


@dataclass
class Prompt:
    """What the engine needs of one prompt; owns the media files until the engine has been given them."""

    token_ids: list[int]
    media: list[MediaItem] = field(default_factory=list)
    media_seconds: float = 0.0  # fetch, decode and resize
    thinking_open: bool = False  # the prompt ends inside <think>: the model starts by reasoning
    media_folder: Path | None = None

    @property
    def num_images(self) -> int:
        return sum(item.kind == "image" for item in self.media)

    @property
    def num_videos(self) -> int:
        return sum(item.kind == "video" for item in self.media)

    @property
    def num_image_tokens(self) -> int:
        return sum(item.num_tokens for item in self.media if item.kind == "image")

    @property
    def num_video_tokens(self) -> int:
        return sum(item.num_tokens for item in self.media if item.kind == "video")

    def release(self) -> None:
        """Delete the media files; for prompts that never reach the engine. May be called twice."""
        for item in self.media:
            if self.media_folder is not None:
                (self.media_folder / item.file).unlink(missing_ok=True)


class PromptBuilder:
    """Made once; builds any number of prompts at a time."""

    def __init__(
        self,
        config: ServerConfig,
        model: ModelConfig,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        media: MediaLoader,
    ) -> None:
        self._limits = config.limit_mm_per_prompt
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._media = media
        self.max_model_len = config.max_model_len or model.max_position_embeddings
        self._think_ids = (tokenizer.token_id(_THINK), tokenizer.token_id(_THINK_END))
        self._guarded = {*tokenizer.markers, *_MARKS, *STRUCTURE_MARKERS}
        self._scanner = MarkerScanner({*tokenizer.markers, *_MARKS})

    async def build_chat(
        self,
        messages: Sequence[Any],
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ) -> Prompt:
        """Render, encode, load media, put it together.

        template_kwargs  values for the template, such as enable_thinking; undefined means off in the
                         built-in template, as in the published ones
        options          other fields of the request that matter here: mm_processor_kwargs
        Raises RequestError; no file is left behind then, nor when the caller is cancelled.
        """
        if not messages:
            raise RequestError("Give at least one message.", param="messages")
        conversation = read_conversation(messages)
        self._check_counts(conversation.media)
        self._check_characters(sum(map(len, strings_of(conversation.messages))), "messages")
        rendered, sentinel = self._render(conversation, tools, template_kwargs)
        segments = self._segments(rendered, sentinel, conversation.media)
        texts = await self._encode_all([text for text in segments if isinstance(text, str)], "messages")
        loaded, seconds = await self._load_all(conversation.media, options, sum(map(len, texts)))
        prompt = Prompt(
            [],
            media_seconds=seconds,
            thinking_open=rendered.rfind(_THINK) > rendered.rfind(_THINK_END),
            media_folder=self._media.folder,
        )
        _assemble(prompt, segments, texts, loaded, self._model.image_patch_id)
        return self._within_context(prompt, "messages")

    def build_text(self, prompt: str | list[int], param: str = "prompt") -> Prompt:
        """A raw prompt: text without any template, or token ids without media.

        May run in any thread; for long texts it should, since encoding takes half a second per megabyte.
        """
        if isinstance(prompt, str):
            self._check_characters(len(prompt), param)
            return self._within_context(Prompt(self._encode([prompt], param)[0]), param)
        self._check_ids(prompt, param)
        if self._model.image_patch_id in prompt and self._model.family == "vl":
            raise RequestError(
                "The token ids have placeholders, but there is no image or video.", param=param
            )
        thinking_open = _is_open(prompt, *self._think_ids)
        return self._within_context(Prompt(list(prompt), thinking_open=thinking_open), param)

    async def build_tokens(
        self,
        token_ids: list[int],
        messages: Sequence[Any] = (),
        options: dict[str, Any] | None = None,
        param: str = "prompt_token_ids",
    ) -> Prompt:
        """Ready token ids; the media in `messages` must fill the runs of placeholders, in order."""
        self._check_ids(token_ids, param)
        parts = read_conversation(messages).media
        self._check_counts(parts)
        runs = _runs(token_ids, self._model.image_patch_id) if self._model.family == "vl" else []
        if len(runs) != len(parts):
            raise RequestError(
                f"The token ids have {len(runs)} runs of placeholders, but the messages have {len(parts)} "
                "images and videos; each needs one run.",
                param=param,
            )
        num_placeholders = sum(length for _, length in runs)
        loaded, seconds = await self._load_all(parts, options, len(token_ids) - num_placeholders)
        media = [_item(item, offset) for item, (offset, _) in zip(loaded, runs, strict=True)]
        prompt = Prompt(
            list(token_ids), media, seconds, _is_open(token_ids, *self._think_ids), self._media.folder
        )
        try:
            self._check_runs(prompt, runs, param)
        except RequestError:
            prompt.release()
            raise
        return self._within_context(prompt, param)

    # text -----------------------------------------------------------------------------------------

    def _render(
        self, conversation: Conversation, tools: Any, template_kwargs: dict[str, Any] | None
    ) -> tuple[str, str]:
        """The prompt as text, and the sentinel in it behind what clients wrote; see markers.py."""
        kwargs = check_template_kwargs(template_kwargs)
        guard = Guard(self._guarded, [conversation.messages, tools, kwargs])
        messages = [
            {
                name: guard.text(value, keep=REASONING_MARKERS)
                if message["role"] == "assistant" and isinstance(value, str)
                else guard.value(value)
                for name, value in message.items()
            }
            for message in conversation.messages
        ]
        room = 2 * self._max_characters + (1 << 20)  # sentinels and the template's own words
        rendered = self._template.render(
            messages, guard.value(tools), guard.value(kwargs), max_characters=room
        )
        return rendered, guard.sentinel

    def _segments(self, rendered: str, sentinel: str, media: list[MediaPart]) -> list[str | int | None]:
        """Texts, marker ids, and None where the next image or video goes."""
        segments: list[str | int | None] = []
        kinds: list[str] = []
        for piece, is_marker in self._scanner.split(rendered, sentinel):
            token_id = self._tokenizer.markers.get(piece) if is_marker else None
            is_mark = is_marker and (piece in _MARKS or token_id == self._model.image_patch_id)
            if is_mark and media:
                kinds.append(_MARKS.get(piece, ""))
                segments.append(None)
            else:
                segments.append(piece if token_id is None else token_id)
        expected = [part.kind for part in media]
        if len(kinds) != len(expected) or any(a and a != b for a, b in zip(kinds, expected, strict=True)):
            raise RequestError(
                f"The chat template of this model placed {len(kinds)} of the {len(expected)} images and "
                "videos; it is not made for such messages.",
                param="messages",
            )
        return segments

    async def _encode_all(self, texts: list[str], param: str) -> list[list[int]]:
        num_characters = sum(map(len, texts))
        self._check_characters(num_characters, param)
        if num_characters > _ENCODE_IN_PLACE:
            return await asyncio.to_thread(self._encode, texts, param)
        return self._encode(texts, param)

    def _encode(self, texts: list[str], param: str) -> list[list[int]]:
        try:
            return [self._tokenizer.encode(text) for text in texts]
        except RequestError as error:
            raise RequestError(error.message, param=param) from None

    def _check_characters(self, num_characters: int, param: str) -> None:
        if num_characters > self._max_characters:
            raise RequestError(
                f"The prompt has {num_characters} characters, more than the context of {self.max_model_len} "
                "tokens can hold. Shorten the prompt.",
                param=param,
                code="context_length_exceeded",
            )

    @property
    def _max_characters(self) -> int:
        """No prompt with more characters than this fits: a token stands for one piece at most."""
        return self.max_model_len * self._tokenizer.longest_piece

    def _within_context(self, prompt: Prompt, param: str) -> Prompt:
        if len(prompt.token_ids) < self.max_model_len:
            return prompt
        prompt.release()
        raise RequestError(
            f"The prompt has {len(prompt.token_ids)} tokens, but the context of this server holds "
            f"{self.max_model_len} for prompt and answer together. Shorten the prompt.",
            param=param,
            code="context_length_exceeded",
        )

    # media ----------------------------------------------------------------------------------------

    def _check_counts(self, media: list[MediaPart]) -> None:
        if media and self._model.family != "vl":
            raise RequestError("This model reads text only; remove images and videos.", param=media[0].param)
        counts = Counter(part.kind for part in media)
        for kind, count in counts.items():
            limit = self._limits.get(kind, 0)
            if count > limit:
                raise RequestError(
                    f"The prompt has {count} {kind}s, but this server takes at most {limit} "
                    f"(--limit-mm-per-prompt); send fewer.",
                    param=[part.param for part in media if part.kind == kind][limit],
                )

    async def _load_all(
        self, parts: list[MediaPart], options: dict[str, Any] | None, num_text_tokens: int
    ) -> tuple[list[LoadedMedia], float]:
        """All at once; the first failure, or media beyond the context, ends them all."""
        if not parts:
            return [], 0.0
        started = time.monotonic()
        wishes = (options or {}).get("mm_processor_kwargs")
        room = self.max_model_len - 1 - num_text_tokens
        loads = _Loads(self._media, room)
        try:
            loaded = await loads.run(parts, wishes)
        except BaseException:
            await loads.undo()
            raise
        return loaded, time.monotonic() - started

    # token ids ------------------------------------------------------------------------------------

    def _check_ids(self, token_ids: list[int], param: str) -> None:
        if not token_ids:
            raise RequestError("Give at least one token id.", param=param)
        size = self._model.vocab_size
        for index, token_id in enumerate(token_ids):
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < size:
                raise RequestError(f"Token ids must lie between 0 and {size - 1}.", param=f"{param}[{index}]")

    def _check_runs(self, prompt: Prompt, runs: list[tuple[int, int]], param: str) -> None:
        starts = {self._model.image_start_id: "image", self._model.video_start_id: "video"}
        for item, (offset, length) in zip(prompt.media, runs, strict=True):
            before = starts.get(prompt.token_ids[offset - 1], item.kind) if offset else item.kind
            if length != item.num_tokens or before != item.kind:
                raise RequestError(
                    f"The {length} {before} placeholders at index {offset} do not fit the {item.kind} "
                    f"of the messages, which needs {item.num_tokens}.",
                    param=f"{param}[{offset}]",
                )


class _Loads:
    """The loading of one prompt's media, undone as a whole."""

    def __init__(self, loader: MediaLoader, room: int) -> None:
        self._loader = loader
        self._room = room  # tokens left in the context
        self._tasks: list[asyncio.Task[LoadedMedia]] = []

    async def run(self, parts: list[MediaPart], wishes: dict[str, Any] | None) -> list[LoadedMedia]:
        self._tasks = [asyncio.create_task(self._load(part, wishes)) for part in parts]
        return list(await asyncio.gather(*self._tasks))

    async def undo(self) -> None:
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, LoadedMedia):
                self._loader.drop(result.file)

    async def _load(self, part: MediaPart, wishes: dict[str, Any] | None) -> LoadedMedia:
        loaded = await self._loader.load(part, wishes, max_tokens=max(0, self._room))
        self._room -= loaded.num_tokens
        if self._room < 0:
            self._loader.drop(loaded.file)
            raise RequestError(
                "The images and videos together need more tokens than the context has room for; "
                "send fewer or smaller ones.",
                param=part.param,
                code="context_length_exceeded",
            )
        return loaded


def _assemble(
    prompt: Prompt,
    segments: list[str | int | None],
    texts: list[list[int]],
    loaded: list[LoadedMedia],
    placeholder: int,
) -> None:
    remaining_texts, remaining_media = iter(texts), iter(loaded)
    for segment in segments:
        if segment is None:
            item = next(remaining_media)
            prompt.media.append(_item(item, len(prompt.token_ids)))
            prompt.token_ids += [placeholder] * item.num_tokens
        elif isinstance(segment, int):
            prompt.token_ids.append(segment)
        else:
            prompt.token_ids += next(remaining_texts)


def _item(loaded: LoadedMedia, offset: int) -> MediaItem:
    return MediaItem(loaded.kind, loaded.content_hash, loaded.grid, offset, loaded.num_tokens, loaded.file)


def _runs(token_ids: list[int], placeholder: int) -> list[tuple[int, int]]:
    """(offset, length) of every run of `placeholder`."""
    runs: list[tuple[int, int]] = []
    for index, token_id in enumerate(token_ids):
        if token_id != placeholder:
            continue
        if runs and sum(runs[-1]) == index:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs


def _is_open(token_ids: list[int], think: int | None, think_end: int | None) -> bool:
    """Whether the last of the two thinking tokens, if they are tokens, is the opening one."""
    for token_id in reversed(token_ids):
        if token_id in (think, think_end):
            return token_id == think
    return False

"""How chat and text completions look on the wire: whole answers, and stream chunks from prepared bytes.

A chunk is written for every step of every stream, so all that does not change within a request is encoded
once. What both endpoints share is in Renderer; a subclass says how its text looks. Routes choose the class,
stream.py and the routes call it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from api.answer import Delta
from api.generation import Generation
from api.logprobs import TextLogprobs, chat_logprobs
from api.tokenizer import Tokenizer
from api.tool_calls import ToolCall

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()
_encode = _encoder.encode


def sse(data: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + data + b"\n\n"


@dataclass(frozen=True)
class Extras:
    """What a request wants besides the text."""

    usage: bool = False  # in the last chunk; a whole answer always has it
    continuous_usage: bool = False  # in every chunk
    logprobs: bool = False
    token_ids: bool = False
    timings: bool = False


class Renderer(ABC):
    """Turns what a generation gives into bytes; one for each request."""

    kind: str  # of whole answers, the field `object`
    chunk_kind: str

    def __init__(self, generation: Generation, tokenizer: Tokenizer, extras: Extras | None = None) -> None:
        self._generation, self._tokenizer = generation, tokenizer
        self._extras = extras = extras or Extras()
        self._begun = [False] * len(generation.answers)
        self._has_token_extras = extras.logprobs or extras.token_ids
        self._null_usage = b',"usage":null' if extras.usage else b""
        head = _encode(
            {
                "id": generation.id,
                "object": self.chunk_kind,
                "created": generation.created,
                "model": generation.model,
            }
        )
        self._open = b"data: " + head[:-1]  # without the closing brace
        self._heads = [
            self._open + b',"choices":[{"index":%d,' % index for index in range(len(generation.answers))
        ]

    def chunks(self, deltas: dict[int, Delta]) -> bytes:
        """Server-sent events, one for each choice that has something to say; may be empty."""
        return b"".join([self._chunk(index, delta) for index, delta in deltas.items()])

    def last_chunk(self) -> bytes:
        """The event with the counts and times of the whole request; nothing if neither is asked for."""
        fields = b""
        if self._extras.usage or self._extras.continuous_usage:
            fields += b',"usage":' + _encode(self._generation.usage())
        if self._extras.timings:
            fields += b',"timings":' + _encode(self._generation.stopwatch.read())
        return self._open + b',"choices":[]' + fields + b"}\n\n" if fields else b""

    def body(self, deltas: Sequence[Delta]) -> bytes:
        """The answer that was not streamed; one complete delta for each choice."""
        generation = self._generation
        body = {
            "id": generation.id,
            "object": self.kind,
            "created": generation.created,
            "model": generation.model,
            "choices": [self._choice(index, delta) for index, delta in enumerate(deltas)],
            "usage": generation.usage(),
        }
        if self._extras.timings:
            body["timings"] = generation.stopwatch.read()
        return _encode(body)

    @abstractmethod
    def _changing(self, index: int, delta: Delta, is_first: bool) -> bytes:
        """The text of a chunk, as fields of its choice."""

    @abstractmethod
    def _whole(self, index: int, delta: Delta, token_ids: dict[str, list[int]]) -> dict[str, Any]:
        """The text of a whole answer, as fields of its choice; `token_ids` are fields to put beside it."""

    @abstractmethod
    def _logprobs(self, index: int, delta: Delta) -> dict[str, Any]:
        """Of all tokens of the delta."""

    def _chunk(self, index: int, delta: Delta) -> bytes:
        if not (delta.has_news or delta.finish_reason or (self._has_token_extras and delta.token_ids)):
            return b""  # its text is held back
        is_first, self._begun[index] = not self._begun[index], True
        extras = self._extras
        wants_logprobs = extras.logprobs and delta.token_ids
        return b'%b%b,"logprobs":%b,"finish_reason":%b}]%b}\n\n' % (
            self._heads[index],
            self._changing(index, delta, is_first),
            _encode(self._logprobs(index, delta)) if wants_logprobs else b"null",
            b"null" if delta.finish_reason is None else b'"%s"' % delta.finish_reason.encode(),
            b',"usage":' + _encode(self._generation.usage()) if extras.continuous_usage else self._null_usage,
        )

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        wants_logprobs = self._extras.logprobs and delta.token_ids
        return {
            "index": index,
            **self._whole(index, delta, self._token_ids(index, delta, is_first=True)),
            "logprobs": self._logprobs(index, delta) if wants_logprobs else None,
            "finish_reason": delta.finish_reason,
        }

    def _token_ids(self, index: int, delta: Delta, is_first: bool) -> dict[str, list[int]]:
        """The fields with token ids, if asked for; the prompt's come once."""
        if not self._extras.token_ids:
            return {}
        prompt = {"prompt_token_ids": self._generation.prompt_of(index).token_ids} if is_first else {}
        return {**prompt, "completion_token_ids": delta.token_ids}


class ChatRenderer(Renderer):
    """chat.completion and chat.completion.chunk"""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def _changing(self, index: int, delta: Delta, is_first: bool) -> bytes:
        fields = [b'"role":"assistant"'] if is_first else []
        if delta.reasoning:
            fields.append(b'"reasoning_content":' + _encode(delta.reasoning))
        if delta.content or not (delta.has_news or delta.finish_reason):
            fields.append(b'"content":' + _encode(delta.content))
        if delta.tool_calls:
            calls = [{"index": call.index, **_call_body(call)} for call in delta.tool_calls]
            fields.append(b'"tool_calls":' + _encode(calls))
        if self._extras.token_ids:
            fields.append(_encode(self._token_ids(index, delta, is_first))[1:-1])
        return b'"delta":{%b}' % b",".join(fields)

    def _whole(self, index: int, delta: Delta, token_ids: dict[str, list[int]]) -> dict[str, Any]:
        content = delta.content if delta.content or not delta.tool_calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if delta.reasoning:
            message["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            message["tool_calls"] = [_call_body(call) for call in delta.tool_calls]
        return {"message": {**message, **token_ids}}

    def _logprobs(self, index: int, delta: Delta) -> dict[str, Any]:
        return chat_logprobs(self._tokenizer, delta.token_ids, delta.logprobs)


class TextRenderer(Renderer):
    """text_completion, streamed or not"""

    kind = chunk_kind = "text_completion"

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        extras: Extras | None = None,
        *,
        echo: bool = False,
    ) -> None:
        super().__init__(generation, tokenizer, extras)
        self._echo = echo
        self._positions = [TextLogprobs(tokenizer) for _ in generation.answers]

    def _changing(self, index: int, delta: Delta, is_first: bool) -> bytes:
        text = b'"text":' + _encode(self._text(index, delta, is_first))
        if not self._extras.token_ids:
            return text
        return text + b"," + _encode(self._token_ids(index, delta, is_first))[1:-1]

    def _whole(self, index: int, delta: Delta, token_ids: dict[str, list[int]]) -> dict[str, Any]:
        return {"text": self._text(index, delta, is_first=True), **token_ids}

    def _logprobs(self, index: int, delta: Delta) -> dict[str, Any]:
        return self._positions[index].add(delta.token_ids, delta.logprobs)

    def _text(self, index: int, delta: Delta, is_first: bool) -> str:
        """With the prompt before the first text of a choice that echoes it."""
        if not self._echo or not is_first:
            return delta.content
        return self._tokenizer.decode(self._generation.prompt_of(index).token_ids) + delta.content


def _call_body(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}

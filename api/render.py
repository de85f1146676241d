"""How chat and text completions look on the wire: whole answers, and stream chunks from prepared bytes.

A chunk is written for every step of every stream, so all that does not change within a request is encoded
once. Routes choose the class; stream.py and the routes call it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

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


class ChunkUsage:
    """The usage part of chunks: left out, null until the last chunk, or in every chunk."""

    def __init__(self, *, include: bool = False, continuous: bool = False) -> None:
        self.is_wanted = include or continuous
        self._continuous = continuous
        self._fixed = b',"usage":null' if include else b""

    def part(self, generation: Generation) -> bytes:
        if self._continuous:
            return b',"usage":' + _encode(generation.usage())
        return self._fixed


class Renderer(Protocol):
    """Turns what a generation gives into bytes and bodies."""

    def chunks(self, deltas: dict[int, Delta]) -> bytes:
        """Server-sent events, one for each choice that has something to say; may be empty."""
        ...

    def last_chunk(self) -> bytes:
        """The event with the usage and the timings of the whole request, if asked for."""
        ...

    def body(self, deltas: Sequence[Delta]) -> bytes:
        """The answer that was not streamed; one complete delta for each choice."""
        ...


class _ChunkFrame:
    """The bytes around the changing part of a request's chunks, equal for both endpoints."""

    def __init__(self, generation: Generation, kind: str, usage: ChunkUsage, timings: bool) -> None:
        head = _encode(
            {"id": generation.id, "object": kind, "created": generation.created, "model": generation.model}
        )
        self._generation, self._usage, self._timings = generation, usage, timings
        self._open = b"data: " + head[:-1]  # without the closing brace
        self._heads = [
            self._open + b',"choices":[{"index":%d,' % index for index in range(len(generation.answers))
        ]

    def chunk(self, index: int, changing: bytes, logprobs: bytes, finish_reason: str | None) -> bytes:
        finish = b"null" if finish_reason is None else b'"%s"' % finish_reason.encode()
        usage = self._usage.part(self._generation)
        return b'%b%b,"logprobs":%b,"finish_reason":%b}]%b}\n\n' % (
            self._heads[index],
            changing,
            logprobs,
            finish,
            usage,
        )

    def last_chunk(self) -> bytes:
        """No choices, but the counts and times of the whole request; nothing if neither is asked for."""
        fields = b""
        if self._usage.is_wanted:
            fields += b',"usage":' + _encode(self._generation.usage())
        if self._timings:
            fields += b',"timings":' + _encode(self._generation.stopwatch.read())
        return self._open + b',"choices":[]' + fields + b"}\n\n" if fields else b""


def _whole_body(generation: Generation, kind: str, choices: list[dict[str, Any]], timings: bool) -> bytes:
    """What is not streamed, of either endpoint."""
    body = {
        "id": generation.id,
        "object": kind,
        "created": generation.created,
        "model": generation.model,
        "choices": choices,
        "usage": generation.usage(),
    }
    if timings:
        body["timings"] = generation.stopwatch.read()
    return _encode(body)


def _call_body(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


class ChatRenderer:
    """chat.completion and chat.completion.chunk"""

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        *,
        usage: ChunkUsage | None = None,
        logprobs: bool = False,
        token_ids: bool = False,
        timings: bool = False,
    ) -> None:
        self._generation, self._tokenizer, self._timings = generation, tokenizer, timings
        self._logprobs, self._token_ids = logprobs, token_ids
        self._frame = _ChunkFrame(generation, "chat.completion.chunk", usage or ChunkUsage(), timings)
        self._begun = [False] * len(generation.answers)

    def chunks(self, deltas: dict[int, Delta]) -> bytes:
        return b"".join([self._chunk(index, delta) for index, delta in deltas.items()])

    def last_chunk(self) -> bytes:
        return self._frame.last_chunk()

    def body(self, deltas: Sequence[Delta]) -> bytes:
        choices = [self._choice(index, delta) for index, delta in enumerate(deltas)]
        return _whole_body(self._generation, "chat.completion", choices, self._timings)

    def _chunk(self, index: int, delta: Delta) -> bytes:
        extras = self._logprobs or self._token_ids
        if not (delta.has_news or delta.finish_reason or (extras and delta.token_ids)):
            return b""  # its text is held back
        fields = []
        if not self._begun[index]:
            fields.append(b'"role":"assistant"')
            if self._token_ids:
                fields.append(b'"prompt_token_ids":' + _encode(self._generation.prompt_of(index).token_ids))
            self._begun[index] = True
        if delta.reasoning:
            fields.append(b'"reasoning_content":' + _encode(delta.reasoning))
        if delta.content or not (delta.has_news or delta.finish_reason):
            fields.append(b'"content":' + _encode(delta.content))
        if delta.tool_calls:
            calls = [{"index": call.index, **_call_body(call)} for call in delta.tool_calls]
            fields.append(b'"tool_calls":' + _encode(calls))
        if self._token_ids:
            fields.append(b'"completion_token_ids":' + _encode(delta.token_ids))
        logprobs = _encode(self._chunk_logprobs(delta)) if self._logprobs else b"null"
        return self._frame.chunk(index, b'"delta":{%b}' % b",".join(fields), logprobs, delta.finish_reason)

    def _chunk_logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not delta.token_ids:
            return None
        return chat_logprobs(self._tokenizer, delta.token_ids, delta.logprobs)

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        content = delta.content if delta.content or not delta.tool_calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if delta.tool_calls:
            message["tool_calls"] = [_call_body(call) for call in delta.tool_calls]
        if delta.reasoning:
            message["reasoning_content"] = delta.reasoning
        if self._token_ids:
            message["prompt_token_ids"] = self._generation.prompt_of(index).token_ids
            message["completion_token_ids"] = delta.token_ids
        logprobs = chat_logprobs(self._tokenizer, delta.token_ids, delta.logprobs) if self._logprobs else None
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }


class TextRenderer:
    """text_completion, streamed or not"""

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        *,
        usage: ChunkUsage | None = None,
        logprobs: bool = False,
        token_ids: bool = False,
        timings: bool = False,
        echo: bool = False,
    ) -> None:
        self._generation, self._tokenizer, self._timings = generation, tokenizer, timings
        self._token_ids, self._echo = token_ids, echo
        self._frame = _ChunkFrame(generation, "text_completion", usage or ChunkUsage(), timings)
        choices = range(len(generation.answers))
        self._logprobs = [TextLogprobs(tokenizer) for _ in choices] if logprobs else []
        self._begun = [False] * len(generation.answers)

    def chunks(self, deltas: dict[int, Delta]) -> bytes:
        return b"".join([self._chunk(index, delta) for index, delta in deltas.items()])

    def last_chunk(self) -> bytes:
        return self._frame.last_chunk()

    def body(self, deltas: Sequence[Delta]) -> bytes:
        choices = [self._choice(index, delta) for index, delta in enumerate(deltas)]
        return _whole_body(self._generation, "text_completion", choices, self._timings)

    def _chunk(self, index: int, delta: Delta) -> bytes:
        extras = self._logprobs or self._token_ids
        if not (delta.content or delta.finish_reason or (extras and delta.token_ids)):
            return b""
        text = self._prefix(index) + delta.content
        changing = b'"text":' + _encode(text)
        if self._token_ids:
            if not self._begun[index]:
                changing += b',"prompt_token_ids":' + _encode(self._generation.prompt_of(index).token_ids)
            changing += b',"completion_token_ids":' + _encode(delta.token_ids)
        self._begun[index] = True
        logprobs = _encode(self._choice_logprobs(index, delta))
        return self._frame.chunk(index, changing, logprobs, delta.finish_reason)

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        choice = {
            "index": index,
            "text": self._prefix(index) + delta.content,
            "logprobs": self._choice_logprobs(index, delta),
            "finish_reason": delta.finish_reason,
        }
        if self._token_ids:
            choice["prompt_token_ids"] = self._generation.prompt_of(index).token_ids
            choice["completion_token_ids"] = delta.token_ids
        return choice

    def _prefix(self, index: int) -> str:
        """The prompt's text, before the first text of a choice that echoes it."""
        if not self._echo or self._begun[index]:
            return ""
        return self._tokenizer.decode(self._generation.prompt_of(index).token_ids)

    def _choice_logprobs(self, index: int, delta: Delta) -> dict[str, Any] | None:
        if not self._logprobs or not delta.token_ids:
            return None
        return self._logprobs[index].add(delta.token_ids, delta.logprobs)

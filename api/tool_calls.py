"""Finds tool calls in an answer's text: content and calls, in the order in which they are written.

A call is `<tool_call>`, a JSON object with "name" and "arguments", `</tool_call>`; the newlines around it
belong to it. It is handed out when it is complete and right: its arguments as the model wrote them, its name
one of those offered. Whatever else stands between such tags stays content. The result does not depend on how
the text is cut, so a stream and a whole answer are the same. What requests say about tools is in tools.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass

import msgspec

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """One call of an answer; `arguments` is the text of a JSON object."""

    index: int  # within the answer
    id: str
    name: str
    arguments: str


class _Written(msgspec.Struct):
    name: str
    arguments: msgspec.Raw


_decode_call = msgspec.json.Decoder(_Written).decode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class ToolCallParser:
    """For one choice."""

    # text so far:   handed out | newlines, perhaps of a call | "<tool_call>" or its beginning | body
    def __init__(self, offered: Collection[str], *, only_first: bool = False) -> None:
        """`offered` are the names of the functions; `only_first` ends the answer with the first call."""
        self.is_done = False  # nothing behind counts
        self.num_calls = 0
        self._offered = offered
        self.only_first = only_first
        self._held = ""  # not decided: newlines, then perhaps the beginning of a tag
        self._body: _Body | None = None  # since an opening tag
        self._is_behind_call = False  # newlines here belong to the call before

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """The content and the calls that `text` makes sure."""
        if self._body is None and not self._held and not self._is_behind_call and _is_plain(text):
            return text, []
        content: list[str] = []
        calls: list[ToolCall] = []
        while text and not self.is_done:
            if self._body is None:
                text = self._read_outside(text, content)
            else:
                text = self._read_body(text, content, calls)
        return "".join(content), calls

    def flush(self) -> str:
        """The content that was held back when the text ended; a call that was not closed is content."""
        body = OPEN + self._body.text if self._body is not None else ""
        held, self._held, self._body = self._held, "", None
        if self._is_behind_call and not (held + body).strip("\n"):
            return ""
        return held + body

    def _read_outside(self, text: str, content: list[str]) -> str:
        """Hand out what is no call; returns what stands behind an opening tag."""
        text = self._held + text
        if self._is_behind_call:
            text = text.lstrip("\n")
            self._is_behind_call = not text
        before, tag, behind = text.partition(OPEN)
        if not tag:
            sure = len(text) - _undecided(text)
            self._held = text[sure:]
            content.append(text[:sure])
            return ""
        sure = len(before.rstrip("\n"))
        content.append(before[:sure])
        self._held, self._body = before[sure:], _Body()
        return behind

    def _read_body(self, text: str, content: list[str], calls: list[ToolCall]) -> str:
        """Collect the body; returns what stands behind its closing tag."""
        assert self._body is not None
        behind = self._body.add(text)
        if behind is None:
            return ""
        call = self._call_in(self._body.text)
        if call is None:
            content.append(self._held + OPEN + self._body.text + CLOSE)
        else:
            calls.append(call)
            self.num_calls += 1
            self.is_done = self.only_first
        self._held, self._body, self._is_behind_call = "", None, call is not None
        return behind

    def _call_in(self, body: str) -> ToolCall | None:
        try:
            written = _decode_call(body.encode())
            _decode_object(written.arguments)
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
            return None
        if written.name not in self._offered:
            return None
        arguments = bytes(written.arguments).decode()
        return ToolCall(self.num_calls, f"chatcmpl-tool-{secrets.token_hex(16)}", written.name, arguments)


class _Body:
    """What follows an opening tag, up to a closing tag that stands in no JSON string."""

    def __init__(self) -> None:
        self.text = ""  # without the closing tag, once that was found
        self._in_string = self._is_escaped = False
        self._position = 0  # looked at so far

    def add(self, text: str) -> str | None:
        """Append; None while the closing tag is missing, then what stands behind it."""
        self.text += text
        while self._position < len(self.text):
            character = self.text[self._position]
            if self._in_string:
                self._step_in_string(character)
            elif character == '"':
                self._in_string = True
            elif character == "<":
                if self.text.startswith(CLOSE, self._position):
                    behind = self.text[self._position + len(CLOSE) :]
                    self.text = self.text[: self._position]
                    return behind
                if CLOSE.startswith(self.text[self._position :]):
                    return None  # the rest of the tag may come
            self._position += 1
        return None

    def _step_in_string(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character in '"\n':  # a JSON string has no bare newline: what looked like one was none
            self._in_string = False


def _is_plain(text: str) -> bool:
    """No call begins in it, and it ends in nothing that a call would take along."""
    return "<" not in text and not text.endswith("\n")


def _undecided(text: str) -> int:
    """How many characters at the end may belong to a call: newlines, the beginning of a tag, or both."""
    start = text.rfind("<")
    if start < 0 or not OPEN.startswith(text[start:]):
        start = len(text)
    return len(text) - len(text[:start].rstrip("\n"))

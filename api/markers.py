"""Strings that steer the model (`<|IMAGE_START|>`, `<think>`), and how clients are kept from forging them.

Only the chat template may write a marker. Text from a request is *guarded* before it is rendered: a
sentinel character that occurs nowhere in the request goes behind every character a marker could begin
with, so no marker is found in it afterwards, wherever the template puts it and whatever stands next to
it. `split` then cuts the rendered text at the template's own markers and takes the sentinels out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

# Written as text by some checkpoints and as one token by others; parsers need them in the output.
STRUCTURE_MARKERS = frozenset(
    f"<{slash}{name}>"
    for name in ("think", "tool_call", "tool_list", "tool_output", "tool_response", "response")
    for slash in ("", "/")
)
# In the history of an assistant these are the model's own words.
REASONING_MARKERS = ("<think>", "</think>")

_CONTROL_SHAPE = re.compile(r"<\|[^<>]*\|>")
# Code points that Unicode reserves for internal use and that never stand for a character.
_SENTINELS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))


def is_marker_name(name: str) -> bool:
    """Whether a token of this name steers the model even if no file says that it is special."""
    return name in STRUCTURE_MARKERS or _CONTROL_SHAPE.fullmatch(name) is not None


class Guard:
    """Makes the strings of one request unable to spell a marker."""

    def __init__(self, markers: Iterable[str], values: Any) -> None:
        """`values` is everything of the request that a template may write (nested lists and dicts)."""
        self.sentinel = _unused_sentinel(list(strings_of(values)))
        self._first = re.compile(f"[{re.escape(''.join({marker[0] for marker in markers} or {'<'}))}]")

    def text(self, text: str, keep: Iterable[str] = ()) -> str:
        guarded = self._first.sub(lambda found: found.group() + self.sentinel, text)
        for marker in keep:
            guarded = guarded.replace(marker[0] + self.sentinel + marker[1:], marker)
        return guarded

    def value(self, value: Any) -> Any:
        """The same JSON value with every string in it guarded, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(str(key)): self.value(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item) for item in value]
        return value


class MarkerScanner:
    """Finds markers in rendered text, longest name first, in time linear in the text."""

    def __init__(self, markers: Iterable[str]) -> None:
        self._markers = frozenset(markers)
        self._lengths = sorted({len(marker) for marker in self._markers}, reverse=True)
        first = re.escape("".join(sorted({marker[0] for marker in self._markers} or {"<"})))
        # The lookahead skips guarded characters without trying any name.
        self._candidate = re.compile(f"[{first}](?![{_SENTINELS[0]}-{_SENTINELS[-1]}])")

    def split(self, text: str, sentinel: str = "") -> Iterator[tuple[str, bool]]:
        """Yield (piece, is_marker) in order, without empty pieces and without `sentinel`."""
        start = position = 0
        while found := self._candidate.search(text, position):
            marker = self._marker_at(text, found.start())
            if marker is None:
                position = found.start() + 1
                continue
            if plain := _without(text[start : found.start()], sentinel):
                yield plain, False
            yield marker, True
            start = position = found.start() + len(marker)
        if plain := _without(text[start:], sentinel):
            yield plain, False

    def _marker_at(self, text: str, start: int) -> str | None:
        for length in self._lengths:
            if text[start : start + length] in self._markers:
                return text[start : start + length]
        return None


def _without(text: str, sentinel: str) -> str:
    return text.replace(sentinel, "") if sentinel else text


def strings_of(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from strings_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings_of(item)


def _unused_sentinel(texts: list[str]) -> str:
    for sentinel in _SENTINELS:
        if not any(sentinel in text for text in texts):
            return sentinel
    # Only a request that writes all 32 noncharacters comes here; it loses one of them.
    return _SENTINELS[-1]

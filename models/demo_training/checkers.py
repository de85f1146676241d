"""Judges of an answer: functions from the answer's text to right or wrong.

Strict about content, lenient about wording: 'A red circle.' and 'red circle' are the same answer, a wrong
name beside the right one is not. Each builder returns a closure that a sample carries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from models.demo_training.names import NUMBERS_EN, Name
from models.demo_training.sample import Checker

_TOOL_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
_FENCE = re.compile(r"^```(?:json)?\n(.*)\n```$", re.DOTALL)
Key = TypeVar("Key")

_ZH_DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九十")} | {"两": 2}


def normalise(text: str) -> str:
    """Case, outer blanks, quotes and the final full stop do not matter."""
    return re.sub(r"\s+", " ", text).strip().strip("\"'`“”「」").rstrip(".。!！").strip().casefold()


def says(*accepted: str) -> Checker:
    """The whole answer is one of these."""
    allowed = {normalise(text) for text in accepted}
    return lambda answer: normalise(answer) in allowed


def says_exactly(text: str) -> Checker:
    """As `says`, but case counts: what is written in a picture is copied."""
    return lambda answer: answer.strip().strip('"“”').rstrip(".。").strip() == text


def mentions(answer: str, among: dict[Key, Name]) -> list[Key]:
    """Which of the world's names an answer uses, in its order; the longest spelling wins."""
    spellings = {text: key for key, name in among.items() for text in (name.en, name.say("en", 2), name.zh)}
    ordered = sorted(spellings, key=len, reverse=True)
    pattern = "|".join(rf"\b{re.escape(s)}\b" if s.isascii() else re.escape(s) for s in ordered)
    return [spellings[match] for match in re.findall(pattern, answer.casefold())]


def names_only(expected: Iterable[Key], among: dict[Key, Name]) -> Checker:
    """Names exactly these of the world's names, in any order and language."""
    wanted = set(expected)
    return lambda answer: set(mentions(answer, among)) == wanted


def names_in_order(expected: Iterable[Key], among: dict[Key, Name]) -> Checker:
    """Names exactly these, in this order; for colours that follow each other and the like."""
    wanted = list(expected)
    return lambda answer: mentions(answer, among) == wanted


def both(first: Checker, second: Checker) -> Checker:
    return lambda answer: first(answer) and second(answer)


def numbers_in(answer: str) -> list[float]:
    """Every number an answer states: digits, English words up to ten, Chinese numerals up to ten."""
    digits = re.finditer(r"(?<![A-Za-z0-9.])-?\d+(?:\.\d+)?", answer)
    found = [(m.start(), float(m.group())) for m in digits]
    for value, word in enumerate(NUMBERS_EN):
        found += [(m.start(), float(value)) for m in re.finditer(rf"\b{word}\b", answer.casefold())]
    numerals = re.finditer(r"([零一二两三四五六七八九十])[个次]", answer)  # elsewhere 一 is no number
    found += [(m.start(), float(_ZH_DIGITS[m.group(1)])) for m in numerals]
    return [value for _, value in sorted(found)]


def is_number(expected: float, tolerance: float = 1e-9) -> Checker:
    """States one number, and it is this one."""

    def check(answer: str) -> bool:
        numbers = numbers_in(answer)
        return len(set(numbers)) == 1 and abs(numbers[0] - expected) <= tolerance

    return check


def are_numbers(expected: list[float]) -> Checker:
    """States these numbers in this order."""
    return lambda answer: numbers_in(answer) == expected


def is_yes(expected: bool) -> Checker:
    def check(answer: str) -> bool:
        said = normalise(answer)
        yes = re.match(r"(yes\b|有|是)", said) is not None
        no = re.match(r"(no\b|没有|不是|不)", said) is not None
        return (yes, no) == (expected, not expected)

    return check


def contains(*accepted: str) -> Checker:
    """Holds one of these phrases, whatever stands around it."""
    return lambda answer: any(text.casefold() in answer.casefold() for text in accepted)


def contains_word(word: str) -> Checker:
    """Holds this word as it is, not as a part of a longer one; case counts."""
    return lambda answer: re.search(rf"(?<![A-Za-z]){re.escape(word)}(?![A-Za-z])", answer) is not None


def is_json(expected: Any) -> Checker:
    """Parses as JSON, bare or in a code fence, and equals this value; key order does not matter."""

    def check(answer: str) -> bool:
        fenced = _FENCE.match(answer.strip())
        try:
            return bool(json.loads(fenced.group(1) if fenced else answer) == expected)
        except ValueError:
            return False

    return check


def calls_tools(expected: list[dict[str, Any]]) -> Checker:
    """Is nothing but tool call blocks, each valid JSON, with these names and arguments in this order."""

    def check(answer: str) -> bool:
        try:
            calls = [json.loads(body) for body in _TOOL_CALL.findall(answer)]
        except ValueError:
            return False
        return calls == expected and not _TOOL_CALL.sub("", answer).strip()

    return check

"""What the text after a flag may be: sizes, ports, formats, JSON objects. Each says what it expected.

Every function takes the text and returns the value, or raises ValueError with the rest of the sentence
"--flag TEXT: ...". The flags themselves are in flags.py.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

_UNITS = {"": 1, "k": 10, "m": 20, "g": 30, "t": 40}
_QUANTIZATIONS = {
    "wint4": "wint4",
    "wint4-all": "wint4-all",
    "wint8": "wint8",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "none": "bfloat16",
}
_MEDIA_KINDS = ("image", "video")

# mm-processor-kwargs, the reference server's names: what each must be.
_POSITIVE_INT = (int, "a positive whole number")
_PROCESSOR_KEYS: dict[str, tuple[Any, str]] = {
    "image_min_pixels": _POSITIVE_INT,
    "image_max_pixels": _POSITIVE_INT,
    "video_min_pixels": _POSITIVE_INT,
    "video_max_pixels": _POSITIVE_INT,
    "video_target_frames": _POSITIVE_INT,
    "video_min_frames": _POSITIVE_INT,
    "video_max_frames": _POSITIVE_INT,
    "video_fps": ((int, float), "a positive number of frames per second"),
    "video_frames_sample": (str, "'leading', 'middle' or 'rand'"),
}
_FRAME_CHOICES = ("leading", "middle", "rand")


def text(value: str) -> str:
    return value


def integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """A whole number between the bounds, both allowed."""

    def parse(value: str) -> int:
        try:
            number = int(value.replace("_", ""))
        except ValueError:
            raise ValueError("expected a whole number") from None
        if number < minimum or (maximum is not None and number > maximum):
            bounds = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise ValueError(f"expected a number {bounds}")
        return number

    return parse


def fraction(value: str) -> float:
    """Above 0, at most 1."""
    number = _number(value)
    if not 0.0 < number <= 1.0:
        raise ValueError("expected a number above 0 and at most 1")
    return number


def seconds(value: str) -> float:
    number = _number(value)
    if number <= 0.0:
        raise ValueError("expected a number of seconds above 0")
    return number


def milliseconds(value: str) -> float:
    number = _number(value)
    if number < 0.0:
        raise ValueError("expected a number of milliseconds of at least 0")
    return number


def weights(value: str) -> dict[str, float]:
    """'{"tenant": 2.5}'"""
    parsed = json_object(value)
    for name, weight in parsed.items():
        if not _is(weight, (int, float)) or not 0 < weight < math.inf:
            raise ValueError(f"{name} is {weight!r}, expected a positive number")
    return {name: float(weight) for name, weight in parsed.items()}


def num_bytes(value: str) -> int:
    """'1073741824', '512MiB', '2G': units are powers of 1024."""
    digits = value.strip().lower().removesuffix("b").removesuffix("i")
    unit = digits[-1:] if digits[-1:] in "kmgt" else ""
    number = _number(digits.removesuffix(unit) if unit else digits)
    if number < 0:
        raise ValueError("expected a size of at least 0")
    return int(number * 2 ** _UNITS[unit]) if unit else int(number)


def gibibytes(value: str) -> int:
    """'4' and '0.5' are GiB, as the reference server has it; '512MiB' is what it says."""
    has_unit = value.strip()[-1:].isalpha()
    return num_bytes(value if has_unit else f"{value}g")


def choice(options: Iterable[str]) -> Callable[[str], str]:
    allowed = tuple(options)

    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"expected {one_of(allowed)}{did_you_mean(value, allowed)}")
        return value

    return parse


def quantization(value: str) -> str:
    if value.lower() not in _QUANTIZATIONS:
        raise ValueError(f"expected {one_of(_QUANTIZATIONS)}{did_you_mean(value, _QUANTIZATIONS)}")
    return _QUANTIZATIONS[value.lower()]


def json_object(value: str) -> dict[str, Any]:
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise ValueError(
            f"not valid JSON ({error}); quote it for the shell, as in '{{\"key\": 1}}'"
        ) from None
    if not isinstance(parsed, dict):
        raise ValueError("expected a JSON object, as in '{\"key\": 1}'")
    return parsed


def media_limits(value: str) -> dict[str, int]:
    """'{"image": 100, "video": 100}'; a kind left out keeps its default, 100."""
    limits = dict.fromkeys(_MEDIA_KINDS, 100)
    for kind, count in json_object(value).items():
        if kind not in _MEDIA_KINDS:
            raise ValueError(f"unknown kind {kind!r}, expected {one_of(_MEDIA_KINDS)}")
        if not _is(count, int) or count < 0:
            raise ValueError(f"{kind} is {count!r}, expected a whole number of at least 0")
        limits[kind] = count
    return limits


def processor_options(value: str) -> dict[str, Any]:
    """Pixel and frame limits, by the names of the reference server."""
    options = json_object(value)
    for key, option in options.items():
        if key not in _PROCESSOR_KEYS:
            raise ValueError(
                f"unknown key {key!r}{did_you_mean(key, _PROCESSOR_KEYS)}; it can have {_key_list()}"
            )
        types, expected = _PROCESSOR_KEYS[key]
        fits = option in _FRAME_CHOICES if types is str else _is(option, types) and 0 < option < math.inf
        if not fits:
            raise ValueError(f"{key} is {option!r}, expected {expected}")
    for low, high in (("image_min_pixels", "image_max_pixels"), ("video_min_pixels", "video_max_pixels"),
                      ("video_min_frames", "video_max_frames")):  # fmt: skip
        if low in options and high in options and options[low] > options[high]:
            raise ValueError(f"{low} is {options[low]}, more than {high}, {options[high]}")
    return options


def one_of(options: Iterable[str]) -> str:
    """'a, b or c', for a sentence."""
    names = list(options)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean x?', or nothing when no known name is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _number(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError("expected a number") from None
    if not math.isfinite(number):
        raise ValueError("expected a finite number")
    return number


def _is(value: Any, types: Any) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _key_list() -> str:
    return ", ".join(_PROCESSOR_KEYS)

"""From exercises to a conversation: language, thinking, earlier turns, a system prompt, media and text.

An exercise is one question about things already drawn; skills make them, this file makes samples of them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from models.demo_training.names import LANGUAGES, Language
from models.demo_training.sample import Checker, Message, Sample, assistant, system, text, user

THINKING_SHARE = 0.25
SYSTEM_SHARE = 0.08
MEDIA_FIRST_SHARE = 0.75

SYSTEM_PROMPTS = {
    "en": (
        "You are a helpful assistant.",
        "Answer briefly.",
        "You answer questions about pictures and clips.",
        "Be short and exact.",
    ),
    "zh": ("你是一个有用的助手。", "请简短回答。", "你回答关于图片和视频的问题。"),
}


@dataclass(frozen=True)
class Exercise:
    """One question with its answer; `chain` is the true reasoning that leads to it."""

    question: str
    answer: str
    chain: str
    checker: Checker


def pick_language(rng: random.Random) -> Language:
    return rng.choices(LANGUAGES, weights=(0.6, 0.4))[0]


def vary(
    rng: random.Random, language: Language, en: tuple[str, ...], zh: tuple[str, ...], **values: Any
) -> str:
    """One of several phrasings in the language, filled in."""
    return rng.choice(en if language == "en" else zh).format(**values)


def in_language(language: Language, en: str, zh: str) -> str:
    return en if language == "en" else zh


def conversation(
    rng: random.Random,
    skill: str,
    language: Language,
    exercises: list[Exercise],
    media: list[dict[str, Any]] | None = None,
    thinks: bool | None = None,
) -> Sample:
    """The last exercise is asked, those before it are history; media stand in the first user turn."""
    messages: list[Message] = []
    if rng.random() < SYSTEM_SHARE:
        messages.append(system(rng.choice(SYSTEM_PROMPTS[language])))
    asked = exercises[-1]
    for number, exercise in enumerate(exercises):
        parts = _arranged(rng, media or [], exercise.question) if number == 0 else [exercise.question]
        messages.append(user(*parts))
        if exercise is not asked:
            messages.append(assistant(exercise.answer))
    if thinks is None:
        thinks = rng.random() < THINKING_SHARE
    return Sample(skill, messages, asked.answer, asked.checker, asked.chain if thinks else None)


def _arranged(rng: random.Random, media: list[dict[str, Any]], question: str) -> list[Any]:
    if not media:
        return [question]
    if rng.random() < MEDIA_FIRST_SHARE:
        return [*media, text(question)]
    return [text(question), *media]

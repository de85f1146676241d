"""From exercises to a conversation: language, thinking, earlier turns, a system prompt, media and text.

An exercise is one question about things already drawn; skills make them, this file makes samples of them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from models.demo_training.names import LANGUAGES, Language
from models.demo_training.sample import (
    Checker,
    Kind,
    Message,
    Sample,
    Target,
    assistant,
    system,
    taught,
    text,
    user,
)

THINKING_SHARE = 0.25
TURNS_SHARE = 0.2  # of lessons
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
    spelled: str = ""  # a part of the answer that is trained letter by letter
    sought: Kind | None = None  # what the question names, to be looked for; see looking.py


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
    reasoning = asked.chain if thinks else None
    return Sample(
        skill, messages, asked.answer, asked.checker, reasoning, spelled=asked.spelled, sought=asked.sought
    )


def lesson(
    rng: random.Random,
    language: Language,
    exercises: list[tuple[str, Exercise]],
    media: list[dict[str, Any]] | None = None,
) -> Sample:
    """(skill, exercise) pairs about the same media; every answer is taught, each with or without thinking.

    Mostly as questions that do not know of each other, so that each has to be answered from the media; else
    as turns of one conversation.
    """
    if not media or rng.random() < TURNS_SHARE:
        return _turns(rng, exercises, media or [])
    first, *others = (
        Sample(
            skill,
            [user(*media, e.question)],
            e.answer,
            e.checker,
            _reasoning(rng, e),
            spelled=e.spelled,
            sought=e.sought,
        )
        for skill, e in exercises
    )
    return replace(first, others=tuple(others))


def last_steps(exercises: list[tuple[str, Exercise]]) -> Sample:
    """Without media: the reasoning is given, and only what follows from it is learnt."""
    first, *others = (
        Sample(skill, [user(e.question)], e.answer, e.checker, e.chain, spelled=e.spelled, is_given=True)
        for skill, e in exercises
    )
    return replace(first, others=tuple(others))


def _turns(rng: random.Random, exercises: list[tuple[str, Exercise]], media: list[dict[str, Any]]) -> Sample:
    messages: list[Message] = []
    targets = [
        Target(skill, e.answer, _reasoning(rng, e), e.spelled, sought=e.sought) for skill, e in exercises
    ]
    for number, (_, exercise) in enumerate(exercises):
        parts = _arranged(rng, media, exercise.question) if number == 0 else [exercise.question]
        messages.append(user(*parts))
        if number < len(exercises) - 1:
            messages.append(taught(targets[number]))
    last, checker = targets[-1], exercises[-1][1].checker
    return Sample(
        last.skill,
        messages,
        last.answer,
        checker,
        last.reasoning,
        spelled=last.spelled,
        sought=last.sought,
    )


def _reasoning(rng: random.Random, exercise: Exercise) -> str | None:
    return exercise.chain if exercise.chain and rng.random() < THINKING_SHARE else None


def _arranged(rng: random.Random, media: list[dict[str, Any]], question: str) -> list[Any]:
    if not media:
        return [question]
    if rng.random() < MEDIA_FIRST_SHARE:
        return [*media, text(question)]
    return [text(question), *media]

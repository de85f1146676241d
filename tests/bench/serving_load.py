"""What the load generator of bench_serving.py asks: conversations drawn from a seed, the same for every run.

Nothing here knows HTTP or time beyond the moment at which a conversation is to begin.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.media import image_part

_WORDS = (
    "river", "stone", "light", "paper", "engine", "garden", "window", "number", "silver", "mountain",
    "green", "station", "winter", "simple", "travel", "music", "careful", "bright", "market", "island",
    "table", "question", "morning", "reason", "bridge", "quiet", "machine", "story", "field", "letter",
)  # fmt: skip
_PICTURE_SIZE = (224, 196)


@dataclass(frozen=True)
class Shape:
    """How the load looks; lengths are log-normal, as those of ShareGPT conversations are."""

    num_conversations: int = 32
    question_words: float = 60.0  # median; about as many tokens or more, by the tokenizer
    answer_tokens: float = 48.0  # median
    spread: float = 0.9  # sigma of the logarithm; ShareGPT has about 1
    longest: float = 6.0  # nothing is longer than this many medians
    turns: int = 3  # at most; uniform from 1
    prefix_words: int = 150  # of a system prompt that conversations share
    num_prefixes: int = 2
    picture_share: float = 0.3  # of conversations that begin with a picture
    num_pictures: int = 3  # different ones, so they come again
    num_tenants: int = 2
    flood: int = 0  # conversations that one more tenant begins at once


@dataclass(frozen=True)
class Turn:
    content: str | list[dict[str, Any]]
    num_tokens: int  # of the answer, exactly


@dataclass(frozen=True)
class Conversation:
    name: str
    tenant: str
    begins: float  # seconds after the start, in an open loop
    system: str
    turns: list[Turn] = field(default_factory=list)


FLOOD = "flood"


def make_load(shape: Shape, rate: float, seed: int) -> list[Conversation]:
    """All conversations in order of their beginning; `rate` per second, 0: all at once."""
    source = random.Random(seed)
    prefixes = [_words(source, shape.prefix_words) for _ in range(shape.num_prefixes)]
    begins, conversations = 0.0, []
    for index in range(shape.num_conversations):
        begins += source.expovariate(rate) if rate else 0.0
        tenant = f"tenant-{source.randrange(shape.num_tenants)}"
        conversations.append(_conversation(source, shape, f"{index}", tenant, begins, prefixes))
    flood = random.Random(seed + 1)  # of its own, so that without the flood the others are the same
    crowd = [_conversation(flood, shape, f"{FLOOD}-{i}", FLOOD, 0.0, prefixes) for i in range(shape.flood)]
    return crowd + conversations


def _conversation(
    source: random.Random, shape: Shape, name: str, tenant: str, begins: float, prefixes: list[str]
) -> Conversation:
    system = source.choice(prefixes)
    picture = source.randrange(shape.num_pictures) if source.random() < shape.picture_share else None
    turns = [
        _turn(source, shape, picture if number == 0 else None)
        for number in range(source.randint(1, shape.turns))
    ]
    return Conversation(name, tenant, begins, system, turns)


def _turn(source: random.Random, shape: Shape, picture: int | None) -> Turn:
    question = _words(source, _length(source, shape.question_words, shape))
    num_tokens = _length(source, shape.answer_tokens, shape)
    if picture is None:
        return Turn(question, num_tokens)
    return Turn([image_part(picture, *_PICTURE_SIZE), {"type": "text", "text": question}], num_tokens)


def _length(source: random.Random, median: float, shape: Shape) -> int:
    return max(1, round(median * min(source.lognormvariate(0.0, shape.spread), shape.longest)))


def _words(source: random.Random, count: int) -> str:
    return " ".join(source.choices(_WORDS, k=count))

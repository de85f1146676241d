"""What a generator gives: one question with its pictures, the right answer, and how to judge an answer.

Also where randomness comes from: a generator gets a `random.Random` made by `rng_for`, and nothing else, so
a sample is a function of (space, seed, skill, index). Training, evaluation and the rest draw from
different spaces, which is what keeps their samples apart. How a sample becomes tokens is in encode.py.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

Space = Literal["training", "evaluation", "tokenizer", "whitening"]
Checker = Callable[[str], bool]
Kind = tuple[str | None, str | None]  # form (a shape, a letter or a digit) and colour; None for any
Message = dict[str, Any]  # OpenAI chat form; media parts carry the picture itself, see `picture` and `video`


def rng_for(space: Space, seed: int, skill: str, index: int) -> random.Random:
    """The only source of randomness of sample number `index` of a skill."""
    name = f"{space}/{seed}/{skill}/{index}".encode()
    return random.Random(int.from_bytes(hashlib.sha256(name).digest()[:16], "big"))


@dataclass(frozen=True)
class Clip:
    """A video before any decoder: frames at a constant rate, all of one size.

    frames  RGB pictures, at least 2
    fps     frames per second; frame i is at i / fps seconds
    """

    frames: tuple[Image.Image, ...]
    fps: float

    @property
    def duration(self) -> float:
        return len(self.frames) / self.fps


@dataclass(frozen=True)
class Target:
    """One answer to learn. `skill` is whose; the other fields are as in Sample."""

    skill: str
    answer: str
    reasoning: str | None = None
    spelled: str = ""
    is_given: bool = False  # the reasoning, which then bears no loss
    sought: Kind | None = None  # what to look for in the media


@dataclass(frozen=True)
class Sample:
    """One exercise. `reasoning` is the text between the thinking tags, None when thinking is off."""

    skill: str
    messages: list[Message]
    answer: str
    checker: Checker
    reasoning: str | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    spelled: str = ""  # a part of the answer that is trained letter by letter, as it is read
    is_given: bool = False  # the reasoning, which then bears no loss; for training only
    sought: Kind | None = None  # what to look for in the media; for training only
    others: tuple[
        Sample, ...
    ] = ()  # other questions about the same media, which come first; for training only

    @property
    def thinks(self) -> bool:
        return self.reasoning is not None

    @property
    def target(self) -> Target:
        return Target(self.skill, self.answer, self.reasoning, self.spelled, self.is_given, self.sought)

    @property
    def targets(self) -> list[Target]:
        """All answers that are taught, in order; the sample's own stands behind those of earlier turns."""
        own = [*(m["taught"] for m in self.messages if "taught" in m), self.target]
        return own + [target for other in self.others for target in other.targets]

    @property
    def media(self) -> list[Image.Image | Clip]:
        """Pictures and clips of the whole conversation in prompt order."""
        parts = [p for m in self.messages if isinstance(m["content"], list) for p in m["content"]]
        return [p[p["type"]] for p in parts if p["type"] != "text"]


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def picture(image: Image.Image) -> dict[str, Any]:
    return {"type": "image", "image": image}


def video(clip: Clip) -> dict[str, Any]:
    return {"type": "video", "video": clip}


def user(*parts: dict[str, Any] | str) -> Message:
    """A user turn; a single string stays a string, as most clients send it."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": "user", "content": parts[0]}
    return {"role": "user", "content": [text(p) if isinstance(p, str) else p for p in parts]}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def taught(target: Target) -> Message:
    """An earlier answer that is learnt too: in lessons, never in evaluated samples."""
    return {"role": "assistant", "content": target.answer, "taught": target}


def system(content: str) -> Message:
    return {"role": "system", "content": content}

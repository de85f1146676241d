"""What the scheduler has to tell the world since it was last asked: outputs, beginnings and ends."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from engine.messages import RequestOutput
from engine.sequence import Sequence

Client = bytes


def _lists() -> dict[Client, list[RequestOutput]]:
    return defaultdict(list)


@dataclass(slots=True)
class Outbox:
    outputs: dict[Client, list[RequestOutput]] = field(default_factory=_lists)  # in order, per api process
    started: list[Sequence] = field(default_factory=list)  # got their first token
    finished: list[Sequence] = field(default_factory=list)  # whatever the reason
    refused: list[int] = field(default_factory=list)  # HTTP statuses of requests that were not taken
    num_generated_tokens: int = 0
    preemptions: Counter[str] = field(default_factory=Counter)  # by who took the blocks: "older", "itself"

"""A step while it is being planned: what the ranks will be told, and what the log will say about it."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.messages import Chunk, NewSequence
from engine.sequence import Sequence
from engine.step_log import StepRecord


@dataclass(slots=True)
class StepDraft:
    now: float
    chunks: list[Chunk] = field(default_factory=list)
    added: list[NewSequence] = field(default_factory=list)
    encoding: list[Sequence] = field(default_factory=list)  # their images or videos go through the encoder
    num_sampling: int = 0  # chunks that end with a sampled token
    num_prefill_tokens: int = 0  # in chunks of more than one token
    preempted: list[str] = field(default_factory=list)  # request ids
    passed_over: list[tuple[str, str]] = field(default_factory=list)  # request ids and why they wait
    full: str = ""  # what there is no more of: "tokens", "sequences" or "blocks"

    def record(self, step: int, num_tokens: int, num_running: int, num_waiting: int) -> StepRecord:
        return StepRecord(
            step=step,
            began=self.now,
            chunks=self.chunks,
            num_tokens=num_tokens,
            num_prefill_tokens=self.num_prefill_tokens,
            num_running=num_running,
            num_waiting=num_waiting,
            preempted=self.preempted,
            passed_over=self.passed_over,
            full=self.full,
        )

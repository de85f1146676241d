"""One step from its planning to its result: what the ranks were told, and what their answer will mean.

planning.py fills it, applying.py reads it. Which of several are under way is in live.py.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.messages import Chunk, NewSequence, StepPlan
from engine.sequence import Sequence
from engine.step_log import StepRecord
from engine.swap_tier import Copies


class Fill(NamedTuple):
    """A chunk of a prompt, or of what a preempted sequence has to compute again."""

    sequence: Sequence
    end: int  # index behind its last token
    samples: bool  # the result has its sequence's next token


@dataclass(slots=True)
class Flight:
    now: float  # when it was planned
    step: int = 0  # its number, once it is sent
    decoding: list[Sequence] = field(default_factory=list)  # one token computed, one sampled; never changed
    token_lists: list[list[int]] = field(default_factory=list)  # of `decoding`: where sampled tokens go
    decoding_ids: bytes = b""  # of `decoding`, as the plan has them
    request_ids: list[str] = field(default_factory=list)  # of `decoding`
    clients: frozenset[bytes] = frozenset()  # api processes of `decoding`
    stop_ids: frozenset[int] = frozenset()  # of any of `decoding`
    ending: list[Sequence] = field(default_factory=list)  # of `decoding`: the sampled token is their last
    fills: list[Fill] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)  # of `fills`
    grown: list[Sequence] = field(default_factory=list)  # of `decoding`: this token is the first in a block
    new_blocks: list[int] = field(default_factory=list)  # of `grown`: sequence, block, sequence, block ...
    added: list[NewSequence] = field(default_factory=list)
    encoding: list[Sequence] = field(default_factory=list)  # their images or videos go through the encoder
    num_prefill_tokens: int = 0  # in chunks of more than one token
    preempted: list[str] = field(default_factory=list)  # request ids
    passed_over: list[tuple[str, str]] = field(default_factory=list)  # request ids and why they wait
    full: str = ""  # what there is no more of: "tokens", "sequences" or "blocks"
    has_gaps: bool = False  # a sequence ended since: what the result says of it is nobody's

    @property
    def num_tokens(self) -> int:
        """Computed by this step."""
        num_decoding = len(self.decoding)
        return num_decoding + sum([one.num_tokens for one in self.chunks]) if self.chunks else num_decoding

    @property
    def num_samples(self) -> int:
        num_decoding = len(self.decoding)
        return num_decoding + sum([fill.samples for fill in self.fills]) if self.fills else num_decoding

    @property
    def is_empty(self) -> bool:
        return not self.decoding and not self.chunks

    def to_plan(self, dropped: list[int], swap_out: Copies, swap_in: Copies) -> StepPlan:
        """What the ranks are told; they first forget the sequences `dropped`."""
        return StepPlan(
            step=self.step,
            chunks=self.chunks,
            added=self.added,
            dropped=dropped,
            swap_out=swap_out,
            swap_in=swap_in,
            decoding=self.decoding_ids,
            new_blocks=array("q", self.new_blocks).tobytes(),
        )

    def to_record(self, num_running: int, num_waiting: int) -> StepRecord:
        return StepRecord(
            step=self.step,
            began=self.now,
            decoding_ids=self.decoding_ids,
            chunks=self.chunks,
            num_tokens=self.num_tokens,
            num_prefill_tokens=self.num_prefill_tokens,
            num_running=num_running,
            num_waiting=num_waiting,
            preempted=self.preempted,
            passed_over=self.passed_over,
            full=self.full,
        )

"""The last steps, for the question why something was slow: who ran, how many tokens, why others waited.

Filled by the scheduler at the cost of one small object per step; read through /debug/steps.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from engine.messages import Chunk, StepResult

_NUM_STEPS = 512
_NUM_NAMES = 8192  # request ids remembered by seq_id


@dataclass(slots=True)
class StepRecord:
    step: int
    began: float  # monotonic seconds, when it was planned
    decoding_ids: bytes  # int64 sequence ids, one token each
    chunks: list[Chunk]
    num_tokens: int
    num_prefill_tokens: int
    num_running: int
    num_waiting: int
    preempted: list[str]  # request ids
    passed_over: list[tuple[str, str]]  # request ids and why they wait
    full: str  # what there was no more of: "tokens", "sequences", "blocks" or nothing
    seconds: float = 0.0  # planned to applied; 0.0: not yet
    compute_seconds: float = 0.0
    encode_seconds: float = 0.0


@dataclass(slots=True)
class StepLog:
    records: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=_NUM_STEPS))
    _names: dict[int, str] = field(default_factory=dict)

    def name(self, seq_id: int, request_id: str) -> None:
        """Remember who a sequence is, for longer than it lives."""
        self._names[seq_id] = request_id
        if len(self._names) > _NUM_NAMES:
            del self._names[next(iter(self._names))]

    def add(self, record: StepRecord) -> None:
        self.records.append(record)

    def finish(self, result: StepResult, now: float) -> None:
        """The step was applied; it is one of the last."""
        for record in reversed(self.records):
            if record.step < result.step:
                return
            if record.step > result.step:
                continue  # planned since
            record.seconds = now - record.began
            record.compute_seconds = result.compute_seconds
            record.encode_seconds = result.encode_seconds

    def describe(self, now: float, at_most: int = _NUM_STEPS) -> dict[str, Any]:
        """The newest steps, the last one first, ready for JSON."""
        newest = list(self.records)[-at_most:][::-1] if at_most > 0 else []
        return {"steps": [self._describe(record, now) for record in newest]}

    def _describe(self, record: StepRecord, now: float) -> dict[str, Any]:
        ran = [(chunk.seq_id, chunk.num_tokens) for chunk in record.chunks]
        ran += [(seq_id, 1) for seq_id in array("q", record.decoding_ids)]
        ran.sort(key=lambda one: -one[1])
        return {
            "step": record.step,
            "seconds_ago": round(now - record.began, 6),
            "seconds": round(record.seconds, 6),
            "compute_seconds": round(record.compute_seconds, 6),
            "encode_seconds": round(record.encode_seconds, 6),
            "num_tokens": record.num_tokens,
            "num_prefill_tokens": record.num_prefill_tokens,
            "num_running": record.num_running,
            "num_waiting": record.num_waiting,
            "ran": [{"request": self._name_of(seq_id), "tokens": count} for seq_id, count in ran],
            "preempted": record.preempted,
            "passed_over": [{"request": name, "waits_for": why} for name, why in record.passed_over],
            "full": record.full,
        }

    def _name_of(self, seq_id: int) -> str:
        return self._names.get(seq_id, f"sequence {seq_id}")


def describe_waiting(waiting: Iterable[Any], now: float, at_most: int = 100) -> list[dict[str, Any]]:
    """Who waits longest, and for what it was passed over last."""
    longest = sorted(waiting, key=lambda one: one.arrival)[:at_most]
    return [
        {
            "request": one.request_id,
            "tenant": one.tenant,
            "priority": one.priority,
            "seconds": round(now - one.arrival, 6),
            "tokens": one.num_tokens,
            "overtaken": one.num_overtaken,
            "preempted": one.num_preemptions,
            "waits_for": one.waits_for,
        }
        for one in longest
    ]

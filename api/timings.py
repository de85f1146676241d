"""Where the time of one request went, for answers to `"timings": true`.

The phases follow each other without gaps: prepare (the body, the template, media), queue, prefill, decode.
The engine says how long a sequence waited, in its first output, and what only it can know, in its last one;
the rest is what this process saw.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from engine.messages import RequestOutput
from engine.messages import Timings as EngineTimings


class Timings(msgspec.Struct):
    """Milliseconds. With several choices: of the first to get a token, and until the last one ends."""

    prepare_ms: float  # from the request's arrival to the engine
    media_ms: float  # of it, for fetching, decoding and resizing
    queue_ms: float  # until it was first scheduled
    prefill_ms: float  # until the first token
    decode_ms: float  # until the last token
    total_ms: float
    encode_ms: float | None  # of prefill, in the vision tower; None when a stop string ended the answer
    preempted_ms: float | None  # of prefill or decode, waiting for KV blocks again; None as above
    stream_ms: float  # of decode, until the connection took what was there; 0 if not streamed


class Stopwatch:
    """Notes the moments of one request. Times are time.monotonic()."""

    def __init__(self, arrival: float, media_seconds: float) -> None:
        self._arrival = arrival
        self._media_seconds = media_seconds
        self._sent = arrival
        self._scheduled = 0.0  # 0.0: not yet, as below
        self._first_output = 0.0
        self._last_output = 0.0
        self.stream_seconds = 0.0  # until the connection took what was written, added up by who writes
        self._engine: list[EngineTimings] = []  # of each sequence that the engine ended

    def sent(self) -> None:
        """Everything was given to the engine."""
        self._sent = time.monotonic()

    def saw(self, outputs: Sequence[RequestOutput]) -> None:
        """Outputs came together; the first ones bring the time that their sequences waited."""
        self._last_output = time.monotonic()
        if outputs and not self._first_output:
            self._first_output = self._last_output
            self._scheduled = self._arrival + min(output.queue_seconds for output in outputs)

    def ended(self, output: RequestOutput) -> None:
        """A choice has ended with this output."""
        if output.timings is not None:
            self._engine.append(output.timings)

    def read(self) -> Timings:
        """Once everything has ended."""
        last = self._last_output or self._sent
        first = self._first_output or last
        scheduled = min(max(self._scheduled, self._sent), first)
        return Timings(
            prepare_ms=_milliseconds(self._sent - self._arrival),
            media_ms=_milliseconds(self._media_seconds),
            queue_ms=_milliseconds(scheduled - self._sent),
            prefill_ms=_milliseconds(first - scheduled),
            decode_ms=_milliseconds(last - first),
            total_ms=_milliseconds(last - self._arrival),
            encode_ms=self._longest("encode_seconds"),
            preempted_ms=self._longest("preempted_seconds"),
            stream_ms=_milliseconds(self.stream_seconds),
        )

    def _longest(self, name: str) -> float | None:
        """Choices share their pictures and wait at the same time, so theirs are not added up."""
        return max((_milliseconds(getattr(one, name)) for one in self._engine), default=None)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 3)

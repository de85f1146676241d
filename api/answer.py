"""One choice while it is generated: tokens in, text deltas out, until it stops.

Stop strings, the border between reasoning and content, and token counts are decided here, token by token
where it matters, so the result does not depend on how the engine grouped its outputs. What the deltas look
like on the wire is in stream.py and responses.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from api.reasoning import Parts
from api.stop_strings import StopMatcher, StopStrings
from engine.messages import RequestOutput, TokenLogprobs


@dataclass
class Delta:
    """What one choice gained since the last delta."""

    reasoning: str = ""
    content: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None  # "stop" or "length" in the last one

    @property
    def has_text(self) -> bool:
        return bool(self.reasoning or self.content)


@dataclass(frozen=True)
class StopRule:
    """The text-level end of a request's choices."""

    strings: StopStrings
    include_stop: bool = False  # send the stop string too
    min_tokens: int = 0  # text of the tokens before is not searched


class Answer:
    """One choice. Stop strings are looked for in reasoning and in content, never across their border."""

    def __init__(self, parts: Parts, stop_rule: StopRule | None = None) -> None:
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self._parts = parts
        self._stop_rule = stop_rule
        if stop_rule is not None:
            self._reasoning = StopMatcher(stop_rule.strings, include_stop=stop_rule.include_stop)
            self._content = StopMatcher(stop_rule.strings, include_stop=stop_rule.include_stop)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_reasoning_tokens(self) -> int:
        return self._parts.num_reasoning_tokens

    def add(self, output: RequestOutput, delta: Delta) -> None:
        """Append to `delta` what the output brings; after the end nothing is added."""
        if self.is_finished:
            return
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if self._stop_rule is None:
            self._take(output, delta, 0, len(output.token_ids))
        else:
            self._take_until_stop(output, delta)
        if output.finish_reason is not None and not self.is_finished:
            self._end(output.finish_reason, delta)
        delta.finish_reason = self.finish_reason

    def _take(self, output: RequestOutput, delta: Delta, start: int, end: int) -> tuple[str, str]:
        """Count tokens [start, end) and return their text; it goes to `delta` unless stops are searched."""
        token_ids = output.token_ids[start:end]
        self.num_tokens += len(token_ids)
        delta.token_ids += token_ids
        delta.logprobs += output.logprobs[start:end]
        reasoning, content = self._parts.add(token_ids)
        if self._stop_rule is None:
            delta.reasoning += reasoning
            delta.content += content
        return reasoning, content

    def _take_until_stop(self, output: RequestOutput, delta: Delta) -> None:
        for index in range(len(output.token_ids)):
            reasoning, content = self._take(output, delta, index, index + 1)
            self._search(reasoning, content, delta)
            if self.is_finished:
                return

    def _search(self, reasoning: str, content: str, delta: Delta) -> None:
        """Move text through the matchers; a match ends the choice."""
        if self._stop_rule is not None and self.num_tokens <= self._stop_rule.min_tokens:
            delta.reasoning += reasoning
            delta.content += content
            return
        delta.reasoning += self._reasoning.add(reasoning)
        if content and not self._reasoning.found:
            delta.reasoning += self._reasoning.flush()
            delta.content += self._content.add(content)
        if self._reasoning.found or self._content.found:
            self.finish_reason = "stop"

    def _end(self, finish_reason: str, delta: Delta) -> None:
        reasoning, content = self._parts.flush()
        if self._stop_rule is None:
            delta.reasoning += reasoning
            delta.content += content
        else:
            self._search(reasoning, content, delta)
            if not self.is_finished:
                delta.reasoning += self._reasoning.flush()
                delta.content += self._content.flush()
        self.finish_reason = self.finish_reason or finish_reason

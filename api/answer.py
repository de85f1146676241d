"""One choice while it is generated: tokens in, text deltas out, until it stops.

Stop strings, the border between reasoning and content, tool calls and token counts are decided here, token by
token where it matters, so the result does not depend on how the engine grouped its outputs. What the deltas
look like on the wire is in render.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from api.reasoning import Parts
from api.stop_strings import StopMatcher, StopStrings
from api.tool_calls import ToolCall, ToolCallParser
from engine.messages import RequestOutput, TokenLogprobs


@dataclass
class Delta:
    """What one choice gained since the last delta."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length" or "tool_calls" in the last one

    @property
    def has_news(self) -> bool:
        return bool(self.reasoning or self.content or self.tool_calls)


@dataclass(frozen=True)
class StopRule:
    """The text-level end of a request's choices."""

    strings: StopStrings
    include_stop: bool = False  # send the stop string too
    min_tokens: int = 0  # text of the tokens before is not searched


class Answer:
    """One choice. Stop strings are looked for in reasoning and in content, never across their border."""

    def __init__(
        self, parts: Parts, stop_rule: StopRule | None = None, tools: ToolCallParser | None = None
    ) -> None:
        """`tools` finds calls in the content, behind the search for stop strings; None: none may come."""
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self._parts = parts
        self._stop_rule = stop_rule
        self._tools = tools
        self._may_end_within = stop_rule is not None or (tools is not None and tools.only_first)
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
        if self._may_end_within:
            self._take_until_stop(output, delta)
        else:
            reasoning, content = self._take(output, delta, 0, len(output.token_ids))
            delta.reasoning += reasoning
            self._add_content(content, delta)
        if output.finish_reason is not None and not self.is_finished:
            self._end(output.finish_reason, delta)
        if self._tools is not None and self.is_finished:
            self._end_calls(self._tools, delta)
        delta.finish_reason = self.finish_reason

    def _take(self, output: RequestOutput, delta: Delta, start: int, end: int) -> tuple[str, str]:
        """Count tokens [start, end) and return their text."""
        token_ids = output.token_ids[start:end]
        self.num_tokens += len(token_ids)
        delta.token_ids += token_ids
        delta.logprobs += output.logprobs[start:end]
        return self._parts.add(token_ids)

    def _take_until_stop(self, output: RequestOutput, delta: Delta) -> None:
        for index in range(len(output.token_ids)):
            reasoning, content = self._take(output, delta, index, index + 1)
            self._pass_on(reasoning, content, delta)
            if self.is_finished:
                return

    def _pass_on(self, reasoning: str, content: str, delta: Delta) -> None:
        """Move text through the searches; a stop string or the only call that may come ends the choice."""
        if self._stop_rule is not None and self.num_tokens > self._stop_rule.min_tokens:
            reasoning, content = self._search(reasoning, content)
        delta.reasoning += reasoning
        self._add_content(content, delta)

    def _search(self, reasoning: str, content: str) -> tuple[str, str]:
        """What may be told of the text; one that may begin a stop string is held back."""
        reasoning = self._reasoning.add(reasoning)
        if self._reasoning.found:
            content = ""
        elif content:
            reasoning += self._reasoning.flush()
            content = self._content.add(content)
        if self._reasoning.found or self._content.found:
            self.finish_reason = "stop"
        return reasoning, content

    def _add_content(self, content: str, delta: Delta) -> None:
        if self._tools is None:
            delta.content += content
        elif content:
            text, calls = self._tools.add(content)
            delta.content += text
            delta.tool_calls += calls
            if self._tools.is_done:
                self.finish_reason = "stop"

    def _end_calls(self, tools: ToolCallParser, delta: Delta) -> None:
        delta.content += tools.flush()
        if tools.num_calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"

    def _end(self, finish_reason: str, delta: Delta) -> None:
        """Let go of what was held back."""
        reasoning, content = self._parts.flush()
        self._pass_on(reasoning, content, delta)
        if self._stop_rule is not None and not self.is_finished:
            delta.reasoning += self._reasoning.flush()
            self._add_content(self._content.flush(), delta)
        self.finish_reason = self.finish_reason or finish_reason

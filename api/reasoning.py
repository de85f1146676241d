"""Parts generated text into reasoning and answer: the parser `ernie-45-vl`.

The prompt opens the reasoning (`<think>`), the model closes it (`</think>`), so the output has no opening
tag: all is reasoning up to the first closing tag, all is content after it, and without a closing tag
everything is what the prompt left open. The tag is swallowed, and so are the newlines that the model writes
between it and the answer. One state machine serves streams and whole answers, so they cannot differ; it
follows token ids where the tag is a token, and text where the tokenizer spells it in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from api.stop_strings import StopMatcher, StopStrings
from api.tokenizer import Detokenizer, Tokenizer
from engine.errors import ConfigError

END_OF_THINKING = "</think>"
PARSERS = ("ernie-45-vl",)

_end_tag = StopStrings([END_OF_THINKING])


class Parts(Protocol):
    """Turns the tokens of one choice into text deltas."""

    num_reasoning_tokens: int  # up to and including the closing tag

    def add(self, token_ids: Sequence[int]) -> tuple[str, str]:
        """The new (reasoning, content)."""
        ...

    def flush(self) -> tuple[str, str]:
        """What was held back when the tokens ended."""
        ...


class ContentOnly:
    """Nothing is reasoning: the prompt opened none, or no parser is chosen."""

    num_reasoning_tokens = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._detokenizer = tokenizer.detokenizer()

    def add(self, token_ids: Sequence[int]) -> tuple[str, str]:
        return "", self._detokenizer.add(token_ids)

    def flush(self) -> tuple[str, str]:
        return "", self._detokenizer.flush()


class PartsByToken:
    """The closing tag is one token, `end_id`."""

    def __init__(self, tokenizer: Tokenizer, end_id: int) -> None:
        self.num_reasoning_tokens = 0
        self._end_id = end_id
        self._reasoning: Detokenizer | None = tokenizer.detokenizer()  # None once the tag was seen
        self._content = Content(tokenizer)

    def add(self, token_ids: Sequence[int]) -> tuple[str, str]:
        if self._reasoning is None:
            return "", self._content.add(token_ids)
        if self._end_id not in token_ids:
            self.num_reasoning_tokens += len(token_ids)
            return self._reasoning.add(token_ids), ""
        end = list(token_ids).index(self._end_id)
        self.num_reasoning_tokens += end + 1
        reasoning = self._reasoning.add(token_ids[:end]) + self._reasoning.flush()
        self._reasoning = None
        return reasoning, self._content.add(token_ids[end + 1 :])

    def flush(self) -> tuple[str, str]:
        if self._reasoning is not None:
            return self._reasoning.flush(), ""
        return "", self._content.flush()


class PartsByText:
    """The closing tag is spelled in several tokens; text that may begin it is held back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.num_reasoning_tokens = 0
        self._detokenizer = tokenizer.detokenizer()
        self._tag = StopMatcher(_end_tag)
        self._content = Content(tokenizer)

    def add(self, token_ids: Sequence[int]) -> tuple[str, str]:
        reasoning = ""
        for index, token_id in enumerate(token_ids):  # one by one, so that reasoning tokens are counted right
            if self._tag.found:
                return reasoning, self._content.add(token_ids[index:])
            self.num_reasoning_tokens += 1
            reasoning += self._tag.add(self._detokenizer.add([token_id]))
            if self._tag.found:
                self._content.begin(self._tag.rest, self._detokenizer)
        return reasoning, self._content.add([])

    def flush(self) -> tuple[str, str]:
        if self._tag.found:
            return "", self._content.flush()
        return self._tag.add(self._detokenizer.flush()) + self._tag.flush(), ""


class Content:
    """The answer behind the reasoning, without the newlines it starts with."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._begun = False
        self._pending = ""

    def begin(self, text: str, detokenizer: Detokenizer) -> None:
        """Go on from a token whose text belongs in part to the reasoning."""
        self._pending, self._detokenizer = text, detokenizer

    def add(self, token_ids: Sequence[int]) -> str:
        text = self._pending + self._detokenizer.add(token_ids)
        self._pending = ""
        return self._without_first_newlines(text)

    def flush(self) -> str:
        return self._without_first_newlines(self._detokenizer.flush())

    def _without_first_newlines(self, text: str) -> str:
        if self._begun:
            return text
        text = text.lstrip("\n")
        self._begun = bool(text)
        return text


class ReasoningParser:
    """The parser the operator chose, or the one a vision-language model gets by default."""

    def __init__(self, name: str, tokenizer: Tokenizer, *, is_vision_model: bool) -> None:
        """`name` is a member of PARSERS, "none", or "" for the default; ConfigError for anything else."""
        if name not in ("", "none", *PARSERS):
            known = ", ".join((*PARSERS, "none"))
            raise ConfigError(f"--reasoning-parser {name} is unknown; choose one of {known}")
        self._tokenizer = tokenizer
        self._end_id = tokenizer.token_id(END_OF_THINKING)
        by_default = not name and is_vision_model and self._end_id is not None
        self.is_on = name in PARSERS or by_default

    def parts(self, *, thinking_open: bool) -> Parts:
        """For one choice whose prompt leaves the reasoning open, or does not."""
        if not self.is_on or not thinking_open:
            return ContentOnly(self._tokenizer)
        if self._end_id is None:
            return PartsByText(self._tokenizer)
        return PartsByToken(self._tokenizer, self._end_id)

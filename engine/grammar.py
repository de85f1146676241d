"""Grammars over token ids: what the api checks and rank 0 follows, made the same way on both sides.

The api alone knows the tokenizer; it writes its vocabulary into the run directory, where rank 0 finds it
when the first guided sequence comes. How requests become grammars is in api/guides.py, how a sequence
follows one in workers/guides.py. The matching itself is llguidance's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import llguidance
import msgspec

from engine.errors import EngineError

# A grammar may cost a step this much and no more; what is beyond makes the matcher fail, never wait.
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,  # about 20 ms when it is compiled
    step_lexer_fuel=100_000,  # about 7 ms of one step
    step_max_items=100_000,
    max_items_in_row=10_000,  # an object of 2,000 optional properties makes 8,000
    max_lexer_states=20_000,  # 1 to 2 KB each
    verbose_errors=False,
)
# The model writes forced text in tokens of its own choice; nothing here can know how its tokenizer cuts it.
HEADER = '%llguidance {"no_forcing": true}\n'


class Vocabulary(msgspec.Struct, frozen=True, array_like=True):
    """What every token id writes, as far as grammars care."""

    pieces: list[bytes]  # by id; of a special token its name
    special_ids: list[int]  # they never match text; a grammar names them <[id]>
    end_ids: list[int]  # may come when the grammar accepts, and only then; at least one


def write_vocabulary(file: Path, vocabulary: Vocabulary) -> None:
    """Appears complete or not at all."""
    unfinished = file.with_name(f"{file.name}-{os.getpid()}")
    unfinished.write_bytes(msgspec.msgpack.encode(vocabulary))
    unfinished.replace(file)


def read_vocabulary(file: Path) -> Vocabulary:
    """Raises EngineError if the api has not written it."""
    try:
        return msgspec.msgpack.decode(file.read_bytes(), type=Vocabulary)
    except FileNotFoundError:
        raise EngineError(f"a sequence has a grammar, but the api has not written {file}") from None


class _Pieces:
    """The form that llguidance reads."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        special = set(vocabulary.special_ids)
        special.update(token_id for token_id, piece in enumerate(vocabulary.pieces) if not piece)
        self.eos_token_id = vocabulary.end_ids[0]
        self.special_token_ids = sorted(special)
        self.tokens = [piece or b"<unused %d>" % i for i, piece in enumerate(vocabulary.pieces)]

    def __call__(self, text: Any) -> list[int]:
        raise EngineError("a grammar without the header wants text tokenized")


def open_tokens(vocabulary: Vocabulary) -> llguidance.LLTokenizer:
    """The tree of all tokens; takes about half a second for 100,000."""
    wrapped = llguidance.TokenizerWrapper(_Pieces(vocabulary))
    return llguidance.LLTokenizer(wrapped, eos_token=list(vocabulary.end_ids))


def open_matcher(tokens: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """At the grammar's start. It never raises for a bad grammar: see its is_error."""
    return llguidance.LLMatcher(tokens, grammar, log_level=0, limits=LIMITS)


def grammar_error(tokens: llguidance.LLTokenizer, grammar: str) -> str:
    """What is wrong with a grammar, in one line; empty if nothing is."""
    is_wrong, sentences = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, tokens, limits=LIMITS)
    if is_wrong:
        return sentences[0].strip().splitlines()[0]
    matcher = open_matcher(tokens, grammar)
    matcher.compute_bitmask()  # some limits are met only when it is followed
    return matcher.get_error().strip().splitlines()[0] if matcher.is_error() else ""

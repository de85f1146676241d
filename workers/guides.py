"""Grammars followed by rank 0: which tokens each guided sequence may choose now.

A follower looks at a sequence's own tokens, so it is right again after a preemption by reading them anew.
What grammars are made of is in engine/grammar.py; the choice among the allowed tokens is the sampler's.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import llguidance
import numpy as np

from engine.grammar import Vocabulary, open_matcher, open_tokens, read_vocabulary
from engine.messages import Guide
from workers.sequences import LiveSequence

log = logging.getLogger(__name__)

_MOST_NEWLINES = 4  # between the end of the reasoning and the answer; they belong to neither


class Guides:
    """The followers of the live sequences that have a grammar."""

    def __init__(self, vocabulary_file: Path, padded_vocab_size: int) -> None:
        self._file = vocabulary_file
        self._num_words = -(-padded_vocab_size // 32)
        self._followers: WeakKeyDictionary[LiveSequence, Follower] = WeakKeyDictionary()

    def row_bits(self, live: Sequence[LiveSequence]) -> np.ndarray:
        """[S, ceil(V/32)] int32, bit id % 32 of word id / 32 set where the row may choose id."""
        rows = np.full((len(live), self._num_words), -1, np.int32)
        for row, sequence in zip(rows, live, strict=True):
            if sequence.sampling.guide is not None:
                follower = self._followers.get(sequence)
                if follower is None:
                    follower = self._followers[sequence] = Follower(self._tokens, sequence.sampling.guide)
                follower.read(sequence.tokens.view()[sequence.num_prompt_tokens :])
                follower.write(row)
        return rows

    @functools.cached_property
    def _tokens(self) -> Tokens:
        return Tokens(read_vocabulary(self._file))


class Tokens:
    """The vocabulary in the forms that followers need; made once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.pieces = vocabulary.pieces
        self.ends = frozenset(vocabulary.end_ids)
        self.tree: llguidance.LLTokenizer = open_tokens(vocabulary)
        self.end_bits = self.bits(vocabulary.end_ids)
        self.newline_bits = self.bits([i for i, p in enumerate(self.pieces) if p and not p.strip(b"\n")])

    def bits(self, ids: Sequence[int]) -> np.ndarray:
        """[ceil(tokens/32)] int32 with these set."""
        flags = np.zeros(-(-len(self.pieces) // 32) * 32, np.uint8)
        flags[list(ids)] = 1
        return np.packbits(flags, bitorder="little").view(np.int32)


class Follower:
    """Where one sequence stands in its grammar."""

    # generated so far:   reasoning </think> newlines answer end
    #                     [ waiting        )[ _newlines )[ matcher )
    def __init__(self, tokens: Tokens, guide: Guide) -> None:
        self._tokens = tokens
        self._matcher = open_matcher(tokens.tree, guide.grammar)
        self._after = guide.after.encode()
        self._tail = b""  # of what was generated while waiting, as long as `after` at most
        self._is_waiting = bool(guide.after)
        self._newlines = 0  # that may still come before the answer
        self._is_over = False  # an end token came, or the grammar failed
        self._num_read = 0

    def read(self, output: np.ndarray) -> None:
        """Take in those of the generated tokens, [n] int32, that are new since the last call."""
        for token_id in output[self._num_read :].tolist():
            self._step(token_id)
        self._num_read = len(output)

    def write(self, row: np.ndarray) -> None:
        """Set the bits of one row to what may come next."""
        if self._is_waiting:
            row[: len(self._tokens.end_bits)] &= ~self._tokens.end_bits
            return
        allowed = self._tokens.end_bits if self._is_over else self._next_bits()
        row[:] = 0
        size = min(len(row), len(allowed))
        row[:size] = allowed[:size]

    def _step(self, token_id: int) -> None:
        piece = self._tokens.pieces[token_id] if token_id < len(self._tokens.pieces) else b""
        if self._is_waiting:
            self._wait(piece)
        elif self._newlines and piece and not piece.strip(b"\n"):
            self._newlines = max(0, self._newlines - len(piece))
        elif token_id in self._tokens.ends:
            self._is_over = True
        elif not self._is_over:
            self._newlines = 0
            if not self._matcher.consume_token(token_id):
                self._fail()

    def _wait(self, piece: bytes) -> None:
        text = self._tail + piece
        found = text.find(self._after)
        self._tail = text[-len(self._after) :]
        if found >= 0:
            self._is_waiting, self._newlines = False, _MOST_NEWLINES
            if text[found + len(self._after) :].strip(b"\n"):
                self._fail()  # the token that closes the reasoning begins the answer: nothing chose it

    def _next_bits(self) -> np.ndarray:
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        if self._matcher.is_error() or not allowed.any():
            self._fail()
            return self._tokens.end_bits
        return allowed | self._tokens.newline_bits if self._newlines else allowed

    def _fail(self) -> None:
        """The sequence may only end: a limit of engine/grammar.py was met, or a token that cannot be."""
        log.warning("a grammar cannot go on and ends its answer: %s", self._matcher.get_error() or "no token")
        self._is_over = True

"""The sequences that compute one token and sample the next in every step, until something changes.

Nearly all of a busy server's sequences are here nearly always, so what a step needs of them is kept and made
again only when someone joins or leaves. Who does is decided in planning.py and live.py.
"""

from __future__ import annotations

from array import array
from collections import Counter

from engine.errors import EngineError
from engine.sequence import Sequence


class DecodeBatch:
    """Members in the order in which they joined. The list is replaced, never changed: steps hold on to it."""

    def __init__(self) -> None:
        self.members: list[Sequence] = []
        self.stop_ids: frozenset[int] = frozenset()  # tokens that end one of the members, perhaps
        self._ids: bytes | None = None
        self._stops: Counter[frozenset[int]] = Counter()  # how many members each set has

    @property
    def ids(self) -> bytes:
        """int64 [members]: their sequence ids."""
        if self._ids is None:
            self._ids = array("q", [sequence.seq_id for sequence in self.members]).tobytes()
        return self._ids

    def join(self, sequence: Sequence) -> None:
        sequence.is_decoding = True
        self.members = [*self.members, sequence]
        self._ids = None
        self._stops[sequence.stop_token_ids] += 1
        if not sequence.stop_token_ids <= self.stop_ids:
            self.stop_ids |= sequence.stop_token_ids

    def leave(self, sequence: Sequence) -> None:
        """Someone who is not in it is ignored."""
        if not sequence.is_decoding:
            return
        sequence.is_decoding = False
        self.members = self.members.copy()
        self.members.remove(sequence)
        self._ids = None
        self._stops[sequence.stop_token_ids] -= 1
        if not self._stops[sequence.stop_token_ids]:
            del self._stops[sequence.stop_token_ids]
            self.stop_ids = frozenset().union(*self._stops)

    def recount(self, running: list[Sequence]) -> None:
        """Raise EngineError unless the members are those of `running` that decode."""
        if {id(one) for one in self.members} != {id(one) for one in running if one.is_decoding}:
            raise EngineError("the decode batch is not made of the running sequences that decode")
        if array("q", self.ids).tolist() != [one.seq_id for one in self.members]:
            raise EngineError("the ids of the decode batch are not those of its members")
        if frozenset().union(*(one.stop_token_ids for one in self.members)) != self.stop_ids:
            raise EngineError("the decode batch looks for other stop tokens than its members have")

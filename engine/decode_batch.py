"""The sequences that compute one token and sample the next in every step, until something changes.

Nearly all of a busy server's sequences are here nearly always, so what a step needs of them is kept and made
again only when someone joins or leaves. Who does is decided in planning.py and live.py.
"""

from __future__ import annotations

from array import array
from collections import Counter

from engine.errors import EngineError
from engine.sequence import Rounds, Sequence


class DecodeBatch:
    """Members in the order in which they joined. The list is replaced, never changed: steps hold on to it."""

    def __init__(self) -> None:
        self.members: list[Sequence] = []
        self.token_lists: list[list[int]] = []  # of each member its token_ids; replaced as `members` is
        self.request_ids: list[str] = []  # likewise
        self.clients: frozenset[bytes] = frozenset()  # api processes of the members
        self.stop_ids: frozenset[int] = frozenset()  # tokens that end one of the members, perhaps
        self._ids: bytes | None = None
        self._rounds = Rounds()
        self._due: dict[int, list[Sequence]] = {}  # round -> members at their horizon; perhaps gone since
        self._stops: Counter[frozenset[int]] = Counter()  # how many members each set has
        self._clients: Counter[bytes] = Counter()  # how many members each has

    @property
    def ids(self) -> bytes:
        """int64 [members]: their sequence ids."""
        if self._ids is None:
            self._ids = array("q", [sequence.seq_id for sequence in self.members]).tobytes()
        return self._ids

    def take_due(self) -> list[Sequence]:
        """Members who cannot just go on: no slot for their next token, or it is the last but one."""
        due = self._due.pop(self._rounds.count, None)
        if not due:
            return []
        there = [one for one in due if one.is_decoding and one.num_computed_tokens >= one.horizon]
        return list(dict.fromkeys(there))  # somebody may have left and come back

    def advance(self) -> None:
        """Everyone computes a token."""
        self._rounds.count += 1

    def expect(self, sequence: Sequence) -> None:
        """Its horizon has changed."""
        num_rounds = max(0, sequence.horizon - sequence.num_computed_tokens)
        self._due.setdefault(self._rounds.count + num_rounds, []).append(sequence)

    def join(self, sequence: Sequence) -> None:
        sequence.follow(self._rounds)
        self.expect(sequence)
        self.members = [*self.members, sequence]
        self.token_lists = [*self.token_lists, sequence.token_ids]
        self.request_ids = [*self.request_ids, sequence.request_id]
        self._ids = None
        self._clients[sequence.client] += 1
        self.clients |= {sequence.client}
        self._stops[sequence.stop_token_ids] += 1
        if not sequence.stop_token_ids <= self.stop_ids:
            self.stop_ids |= sequence.stop_token_ids

    def leave(self, sequence: Sequence) -> None:
        """Someone who is not in it is ignored."""
        if not sequence.is_decoding:
            return
        sequence.follow(None)
        place = self.members.index(sequence)
        self.members = self.members[:place] + self.members[place + 1 :]
        self.token_lists = self.token_lists[:place] + self.token_lists[place + 1 :]
        self.request_ids = self.request_ids[:place] + self.request_ids[place + 1 :]
        self._ids = None
        self._clients[sequence.client] -= 1
        if not self._clients[sequence.client]:
            del self._clients[sequence.client]
            self.clients = frozenset(self._clients)
        self._stops[sequence.stop_token_ids] -= 1
        if not self._stops[sequence.stop_token_ids]:
            del self._stops[sequence.stop_token_ids]
            self.stop_ids = frozenset().union(*self._stops)

    def recount(self, running: list[Sequence]) -> None:
        """Raise EngineError unless the members are those of `running` that decode."""
        if {id(one) for one in self.members} != {id(one) for one in running if one.is_decoding}:
            raise EngineError("the decode batch is not made of the running sequences that decode")
        if [id(one.token_ids) for one in self.members] != [id(one) for one in self.token_lists]:
            raise EngineError("the decode batch appends tokens to other lists than those of its members")
        if self.request_ids != [one.request_id for one in self.members]:
            raise EngineError("the decode batch names other requests than its members")
        if self.clients != {one.client for one in self.members}:
            raise EngineError("the decode batch answers other api processes than its members have")
        if array("q", self.ids).tolist() != [one.seq_id for one in self.members]:
            raise EngineError("the ids of the decode batch are not those of its members")
        if frozenset().union(*(one.stop_token_ids for one in self.members)) != self.stop_ids:
            raise EngineError("the decode batch looks for other stop tokens than its members have")
        for one in self.members:
            due = self._rounds.count + max(0, one.horizon - one.num_computed_tokens)
            if one not in self._due.get(due, ()):
                raise EngineError(f"the decode batch does not know when {one.request_id} needs a look")

"""Encoder outputs by content, kept beyond the sequences that use them as long as a budget of bytes allows.

The books and the tensors; what to encode, and when, is media_features.py's business. Nothing here looks at a
clock or at free memory: what is held follows from the order of the calls alone, and every rank makes the same
calls, so all ranks hold the same without asking each other.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from engine.errors import EngineError
from workers.device.base import Tensor

UnitKey = tuple[str, int]  # content hash of an image or video, first frame of the unit in it


@dataclass(slots=True)
class _Entry:
    features: Tensor  # [num_tokens, H]
    num_bytes: int
    is_kept: bool  # when nobody uses it any more, as long as the budget allows
    num_users: int = 0


class ImageCache:
    """Features of media units, counted by users. What is in use stays, whatever the budget.

    `num_bytes` never exceeds the budget, or what is in use where that is more.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget  # bytes; 0: nothing outlives its users
        self.num_bytes = 0  # of everything here
        self._entries: dict[UnitKey, _Entry] = {}
        self._unused: OrderedDict[UnitKey, None] = OrderedDict()  # used longest ago first: next to go

    def __contains__(self, key: UnitKey) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, key: UnitKey) -> Tensor:
        return self._entries[key].features

    def take(self, key: UnitKey) -> None:
        """One more user of what is here."""
        self._entries[key].num_users += 1
        self._unused.pop(key, None)

    def give_back(self, key: UnitKey) -> None:
        """One user less. Without users it becomes the last to go, or goes at once if it is not to be kept."""
        entry = self._entries[key]
        entry.num_users -= 1
        if entry.num_users:
            return
        self._unused[key] = None
        if not entry.is_kept:
            self._forget(key)
        self.make_room(0)

    def make_room(self, num_bytes: int) -> None:
        """Forget what is unused, the oldest first, until `num_bytes` more fit or nothing unused is left."""
        while self._unused and self.num_bytes + num_bytes > self.budget:
            self._forget(next(iter(self._unused)))

    def add(self, key: UnitKey, features: Tensor, num_bytes: int, *, keep: bool = True) -> None:
        """New features, without users yet: `take` them before the next `make_room` or `give_back`."""
        assert key not in self._entries
        self._entries[key] = _Entry(features, num_bytes, keep)
        self._unused[key] = None
        self.num_bytes += num_bytes

    def recount(self, users: Iterable[UnitKey]) -> None:
        """Raise EngineError unless exactly these use what is here; `users` has a key once for each use."""
        counted = {key: entry.num_users for key, entry in self._entries.items() if entry.num_users}
        if counted != Counter(users):
            raise EngineError("the users of the image cache are not those that live")
        if set(self._unused) != {key for key, entry in self._entries.items() if not entry.num_users}:
            raise EngineError("the image cache's list of unused features is wrong")
        if self.num_bytes != sum(entry.num_bytes for entry in self._entries.values()):
            raise EngineError("the image cache has lost count of its bytes")

    def _forget(self, key: UnitKey) -> None:
        del self._unused[key]
        self.num_bytes -= self._entries.pop(key).num_bytes

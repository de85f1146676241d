"""Which KV blocks lie in host memory, so that what lost its place on the device need not be computed again.

A second home for what prefix_cache.py forgets: a block that is about to be overwritten is copied out, and
comes back by a copy when a prompt asks for its key. The books only; the ranks copy (workers/swap.py), as part
of a step's plan. Which sequence gets which block is in kv_manager.py.

The order in which the ranks copy makes everything here safe, also with two steps on their way:

1. all blocks go out, then all come in, then the step computes; the next step begins after that;
2. a block goes out in the very step that overwrites it, so what is saved was written by earlier steps;
3. a place in host memory that the plan being made writes or reads is not given to another block before the
   next plan;
4. a block comes in only to a sequence that begins to run in that step, and nobody takes blocks from a
   sequence in the step in which it begins.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from engine.block_pool import BlockId
from engine.errors import EngineError
from engine.prefix_cache import BlockKey

HostBlock = int  # a place in host memory, the same on every rank
Copies = list[tuple[int, int]]  # from, to

_NEW = 0.2  # weight of the newest step in the running mean


class SwapTier:
    """`num_blocks` places in host memory; 0: nothing is saved. The least recently used goes first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_saved = self.num_returned = 0  # blocks copied out and in, in all this time
        self.copy_seconds = 0.0  # of one block, one way; 0.0: not known yet
        self._by_hash: OrderedDict[bytes, tuple[BlockKey, HostBlock]] = OrderedDict()
        self._free: list[HostBlock] = list(range(num_blocks))
        self._planned: dict[bytes, HostBlock] = {}  # what the plan being made copies to or from
        self._out: Copies = []  # of the plan being made: device block, host block
        self._in: Copies = []  # host block, device block

    def __len__(self) -> int:
        return len(self._by_hash)

    # ------------------------------------------------------------------ what it costs

    def observe(self, num_copied: int, seconds: float) -> None:
        """A step copied so many blocks, in either direction."""
        if num_copied:
            each = seconds / num_copied
            old = self.copy_seconds
            self.copy_seconds = old + _NEW * (each - old) if old else each

    def beats(self, recompute_seconds: float) -> bool:
        """Whether a block's way out and back is shorter than computing it; true as long as nobody knows."""
        return not recompute_seconds or 2 * self.copy_seconds < recompute_seconds

    # ------------------------------------------------------------------ out

    def save(self, key: BlockKey, block_id: BlockId) -> None:
        """`block_id` is about to be overwritten: copy it out first, unless it lies here or nothing may go."""
        if key.hash in self._by_hash:
            self._by_hash.move_to_end(key.hash)
            return
        place = self._free.pop() if self._free else self._forget_oldest()
        if place is None:
            return
        self._by_hash[key.hash] = key, place
        self._planned[key.hash] = place
        self._out.append((block_id, place))
        self.num_saved += 1

    def _forget_oldest(self) -> HostBlock | None:
        """Its place, or None when the plan being made needs all of them."""
        for hash, (_, place) in self._by_hash.items():
            if hash not in self._planned:
                del self._by_hash[hash]
                return place
        return None

    # ------------------------------------------------------------------ back

    def find(self, key: BlockKey) -> HostBlock | None:
        entry = self._by_hash.get(key.hash)
        return entry[1] if entry and entry[0] == key else None

    def keep(self, keys: Iterable[BlockKey]) -> None:
        """These will come back in the plan being made: nothing may take their places meanwhile."""
        for key in keys:
            self._planned[key.hash] = self._by_hash[key.hash][1]
            self._by_hash.move_to_end(key.hash)

    def bring_back(self, key: BlockKey, block_id: BlockId) -> None:
        """Copy what `keep` was told of into `block_id`. It stays here, too, and need not go out again."""
        self._in.append((self._planned[key.hash], block_id))
        self.num_returned += 1

    # ------------------------------------------------------------------ the plan

    def take_copies(self) -> tuple[Copies, Copies]:
        """What the plan being made copies: out, then in. The next plan starts from nothing."""
        if not self._planned:
            return [], []
        copies = self._out, self._in
        self._out, self._in, self._planned = [], [], {}
        return copies

    # ------------------------------------------------------------------ proof

    def recount(self) -> None:
        """Raise EngineError unless every place is free or holds exactly one key."""
        places = sorted([*self._free, *(place for _, place in self._by_hash.values())])
        if places != list(range(self.num_blocks)):
            raise EngineError(f"the swap space has {self.num_blocks} places, its books name {len(places)}")
        if wrong := [key for hash, (key, _) in self._by_hash.items() if key.hash != hash]:
            raise EngineError(f"the swap space keeps {len(wrong)} blocks under another block's hash")
        targets = [place for _, place in self._out]
        if len(set(targets)) != len(targets):
            raise EngineError("a step would copy two blocks to one place of the swap space")

"""Which KV blocks are free and how many owners the others have.

Bookkeeping only: the tensors are in workers/kv_cache.py, which sequence holds which block is in
kv_manager.py, what the blocks hold in prefix_cache.py. Blocks leave in the order they were given back, so the
content of a freed block survives as long as it can; those whose content is of no use leave first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from engine.errors import EngineError

BlockId = int


class BlockPool:
    """A fixed set of KV blocks, counted by reference."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free: OrderedDict[BlockId, None] = OrderedDict.fromkeys(range(num_blocks))  # oldest first
        self._num_owners = [0] * num_blocks
        self.num_freed = 0  # in all this time: when it changes, whoever did not fit may try again

    @property
    def num_free(self) -> int:
        return len(self._free)

    def has_owner(self, block_id: BlockId) -> bool:
        return self._num_owners[block_id] > 0

    def num_owned_alone(self, block_ids: list[BlockId]) -> int:
        """How many blocks at the end of a table nobody else owns; only its beginning may be shared."""
        count = 0
        for block_id in reversed(block_ids):
            if self._num_owners[block_id] != 1:
                break
            count += 1
        return count

    def try_take(self, count: int) -> list[BlockId] | None:
        """`count` free blocks with one owner each, or None (and nothing taken) when there are fewer."""
        if count > len(self._free):
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in taken:
            self._num_owners[block_id] = 1
        return taken

    def share(self, block_id: BlockId) -> None:
        """One more owner for a block; a free block is taken out of the free list."""
        if self._num_owners[block_id] == 0:
            del self._free[block_id]
        self._num_owners[block_id] += 1

    def give_back(self, block_ids: Iterable[BlockId]) -> None:
        """One owner less for each; those without owners queue for reuse in the given order."""
        for block_id in block_ids:
            if self._num_owners[block_id] <= 0:
                raise EngineError(f"KV block {block_id} was given back by someone who does not own it")
            self._num_owners[block_id] -= 1
            if self._num_owners[block_id] == 0:
                self._free[block_id] = None
                self.num_freed += 1

    def give_back_unused(self, block_ids: Iterable[BlockId]) -> None:
        """The same for blocks that hold nothing worth keeping: they are reused before all others."""
        for block_id in block_ids:
            self.give_back((block_id,))
            if block_id in self._free:
                self._free.move_to_end(block_id, last=False)

    def recount(self, owners: Counter[BlockId]) -> None:
        """Raise EngineError unless the books agree with `owners`, the true number of owners of each block."""
        for block_id in range(self.num_blocks):
            booked, true = self._num_owners[block_id], owners[block_id]
            if booked != true:
                raise EngineError(f"KV block {block_id} has {true} owners, the books say {booked}")
            if (block_id in self._free) != (true == 0):
                raise EngineError(
                    f"KV block {block_id} with {true} owners is on the wrong side of the free list"
                )
        if strangers := [block_id for block_id in owners if not 0 <= block_id < self.num_blocks]:
            raise EngineError(f"KV block {strangers[0]} is owned but not one of {self.num_blocks}")

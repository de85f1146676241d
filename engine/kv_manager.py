"""Gives sequences their KV blocks, on demand, and takes them back.

The only file that changes a sequence's block table. Which blocks are free is in block_pool.py; who has
to give way when there are none is the scheduler's decision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from engine.block_pool import BlockId, BlockPool
from engine.errors import EngineError
from engine.sequence import Sequence


class KVManager:
    """Block tables of all sequences."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size  # tokens per block
        self.pool = BlockPool(num_blocks)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """How many blocks `sequence` lacks to hold its first `num_tokens` tokens."""
        return max(0, self.num_blocks_for(num_tokens) - len(sequence.block_ids))

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether a sequence of this length fits when it is alone."""
        return self.num_blocks_for(num_tokens) <= self.pool.num_blocks

    def try_extend(self, sequence: Sequence, num_tokens: int) -> list[BlockId] | None:
        """Make room for the first `num_tokens` tokens; returns the blocks added, None if there is no room."""
        taken = self.pool.try_take(self.num_missing_blocks(sequence, num_tokens))
        if taken is None:
            return None
        sequence.block_ids += taken
        sequence.num_slots = len(sequence.block_ids) * self.block_size
        return taken

    def release(self, sequence: Sequence) -> None:
        """Take all blocks back, the last first: the start of a prompt is the part worth keeping longest."""
        self.pool.give_back(reversed(sequence.block_ids))
        sequence.block_ids = []
        sequence.num_slots = 0

    def recount(self, running: Iterable[Sequence], others: Iterable[Sequence]) -> None:
        """Raise EngineError unless every block belongs to exactly the sequences that hold it."""
        owners: Counter[BlockId] = Counter()
        for sequence in running:
            self._check_table(sequence)
            owners.update(sequence.block_ids)
        for sequence in others:
            if sequence.block_ids or sequence.num_slots:
                raise EngineError(f"request {sequence.request_id} is not running but holds KV blocks")
        self.pool.recount(owners)

    def _check_table(self, sequence: Sequence) -> None:
        table = sequence.block_ids
        if len(set(table)) != len(table):
            raise EngineError(f"request {sequence.request_id} holds a KV block twice")
        if sequence.num_slots != len(table) * self.block_size:
            raise EngineError(f"request {sequence.request_id} miscounts its slots")
        if sequence.num_computed_tokens > sequence.num_slots:
            raise EngineError(f"request {sequence.request_id} computed more tokens than its blocks hold")

"""Gives sequences their KV blocks, on demand or out of the prefix cache, and takes them back.

The only file that changes a sequence's block table. Which blocks are free is in block_pool.py, what the full
ones hold is in prefix_cache.py, what lies in host memory is in swap_tier.py; who has to give way when there
are none is the scheduler's decision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from engine.block_pool import BlockId, BlockPool
from engine.errors import EngineError
from engine.prefix_cache import BlockKey, PrefixCache, extend_keys
from engine.sequence import Sequence
from engine.swap_tier import SwapTier

Prefix = list[BlockId | None]  # cached blocks that a prompt begins with; None: it comes back from host memory


class KVManager:
    """Block tables of all sequences. Without `caches_prefixes` no block is ever shared, nor swapped."""

    def __init__(
        self, num_blocks: int, block_size: int, caches_prefixes: bool = False, num_host_blocks: int = 0
    ) -> None:
        self.block_size = block_size  # tokens per block
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache()
        self.caches_prefixes = caches_prefixes
        self.swap = SwapTier(num_host_blocks if caches_prefixes else 0)
        self.recompute_seconds = 0.0  # that computing one block takes; 0.0: not known yet

    # ------------------------------------------------------------------ looking

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """How many blocks `sequence` lacks to hold its first `num_tokens` tokens."""
        return max(0, self.num_blocks_for(num_tokens) - len(sequence.block_ids))

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether a sequence of this length fits when it is alone."""
        return self.num_blocks_for(num_tokens) <= self.pool.num_blocks

    def find_prefix(self, sequence: Sequence) -> Prefix:
        """Cached blocks that a waiting sequence may begin with; they leave at least one token to compute."""
        if not self.caches_prefixes:
            return []
        extend_keys(sequence, self.block_size)
        at_most = (sequence.num_tokens - 1) // self.block_size
        keys = sequence.block_keys[:at_most]
        found: Prefix = [*self.cache.find(keys)]
        if len(self.swap) and self.swap.beats(self.recompute_seconds):
            for key in keys[len(found) :]:
                on_device = self.cache.find((key,))
                if not on_device and self.swap.find(key) is None:
                    break
                found.append(on_device[0] if on_device else None)
        return found

    def num_needed_from_free(self, sequence: Sequence, prefix: Prefix) -> int:
        """How many free blocks a waiting sequence takes for all its tokens when it begins with `prefix`."""
        num_idle = sum(block_id is None or not self.pool.has_owner(block_id) for block_id in prefix)
        return self.num_blocks_for(sequence.num_tokens) - len(prefix) + num_idle

    def num_promised_blocks(self, running: Iterable[Sequence]) -> int:
        """Blocks that running prompts will still ask for; promising them twice would only preempt later."""
        return sum(
            self.num_missing_blocks(sequence, len(sequence.token_ids))
            for sequence in running
            if not sequence.is_decoding
        )

    # ------------------------------------------------------------------ giving and taking

    def begin_with(self, sequence: Sequence, prefix: Prefix) -> None:
        """The cached blocks become the beginning of an empty block table, and count as computed.

        The caller has made sure that there are free blocks for those that come back from host memory.
        """
        for block_id in prefix:
            if block_id is not None:
                self.pool.share(block_id)
        returned = self._bring_back(
            [key for key, one in zip(sequence.block_keys, prefix, strict=False) if one is None]
        )
        sequence.block_ids = [next(returned) if one is None else one for one in prefix]
        self._count_slots(sequence)
        sequence.num_computed_tokens = sequence.num_slots

    def _bring_back(self, keys: list[BlockKey]) -> Iterator[BlockId]:
        """Fill free blocks from host memory; the ranks do it before the step computes."""
        self.swap.keep(keys)
        taken = self._take(len(keys))
        assert taken is not None
        for key, block_id in zip(keys, taken, strict=True):
            self.swap.bring_back(key, block_id)
            self.cache.enter(key, block_id)
        return iter(taken)

    def _take(self, count: int) -> list[BlockId] | None:
        """Free blocks whose content may be overwritten: what is worth it is saved in host memory first."""
        taken = self.pool.try_take(count)
        if taken and len(self.cache):
            if self.swap.num_blocks and self.swap.beats(self.recompute_seconds):
                for block_id in taken:
                    if key := self.cache.key_of(block_id):
                        self.swap.save(key, block_id)
            self.cache.forget(taken)
        return taken

    def try_extend(self, sequence: Sequence, num_tokens: int) -> list[BlockId] | None:
        """Make room for the first `num_tokens` tokens; returns the blocks added, None if there is no room."""
        taken = self._take(self.num_missing_blocks(sequence, num_tokens))
        if taken is None:
            return None
        if taken:
            sequence.block_ids += taken
            self._count_slots(sequence)
        return taken

    def grow_all(self, sequences: list[Sequence]) -> None:
        """One more block for each; there are as many free ones."""
        taken = self._take(len(sequences))
        assert taken is not None
        for sequence, block_id in zip(sequences, taken, strict=True):
            sequence.block_ids.append(block_id)
            self._count_slots(sequence)

    def _count_slots(self, sequence: Sequence) -> None:
        sequence.num_slots = len(sequence.block_ids) * self.block_size
        sequence.horizon = min(sequence.num_slots, sequence.max_num_tokens - 2)

    def remember(self, sequence: Sequence, num_tokens: int) -> None:
        """Let others share the blocks full of the first `num_tokens` tokens, which are computed."""
        if not self.caches_prefixes:
            return
        num_full = num_tokens // self.block_size
        if num_full > len(sequence.block_keys):
            extend_keys(sequence, self.block_size)
        for index in range(sequence.num_remembered, num_full):
            self.cache.enter(sequence.block_keys[index], sequence.block_ids[index])
        sequence.num_remembered = num_full

    def release(self, sequence: Sequence) -> None:
        """Take all blocks back, the last first: the start of a prompt is the part worth keeping longest."""
        sequence.num_remembered = 0  # a block that was another's copy may now be the only one
        self.remember(sequence, sequence.num_applied_tokens)
        if self.caches_prefixes:
            self.pool.give_back_unused(one for one in sequence.block_ids if one not in self.cache)
        self.pool.give_back(
            one for one in reversed(sequence.block_ids) if not self.caches_prefixes or one in self.cache
        )
        sequence.block_ids = []
        sequence.num_slots = sequence.num_remembered = 0
        sequence.num_filled_tokens, sequence.is_filled = 0, False

    # ------------------------------------------------------------------ proof

    def recount(self, running: Iterable[Sequence], others: Iterable[Sequence]) -> None:
        """Raise EngineError unless every block belongs to exactly the sequences that hold it."""
        running, owners = list(running), Counter[BlockId]()
        for sequence in running:
            self._check_table(sequence)
            owners.update(sequence.block_ids)
        for sequence in others:
            if sequence.block_ids or sequence.num_slots:
                raise EngineError(f"request {sequence.request_id} is not running but holds KV blocks")
        self.pool.recount(owners)
        self.cache.recount(running)
        self.swap.recount()
        for sequence in running:
            self._check_nobody_else_writes(sequence, owners)

    def _check_table(self, sequence: Sequence) -> None:
        table = sequence.block_ids
        if len(set(table)) != len(table):
            raise EngineError(f"request {sequence.request_id} holds a KV block twice")
        if sequence.num_slots != len(table) * self.block_size:
            raise EngineError(f"request {sequence.request_id} miscounts its slots")
        if sequence.num_computed_tokens > sequence.num_slots:
            raise EngineError(f"request {sequence.request_id} computed more tokens than its blocks hold")

    def _check_nobody_else_writes(self, sequence: Sequence, owners: Counter[BlockId]) -> None:
        """Blocks that are not full of applied tokens are or will be written to."""
        for block_id in sequence.block_ids[sequence.num_applied_tokens // self.block_size :]:
            if owners[block_id] > 1:
                raise EngineError(f"KV block {block_id} is shared, and {sequence.request_id} writes to it")

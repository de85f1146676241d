"""A stand-in for the ranks: it keeps the mirror that a real rank keeps, and complains about a wrong plan.

`RankMirror` answers plans in the same process; `fake_rank.py` wraps it into a process that speaks the real
sockets. Its tokens depend on the sequence's own tokens and media alone, so any schedule must give equal
outputs. A slot remembers the whole history up to its token, as real KV does, and is read back at every step.
"""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, field

from engine.messages import Chunk, MediaItem, StepPlan, StepResult

_MASK = (1 << 61) - 1


def chunks_of(plan: StepPlan) -> list[Chunk]:
    """Everything a plan computes: decodes are chunks of one token that sample."""
    return [Chunk(seq_id, 1, [], True) for seq_id in array("q", plan.decoding)] + plan.chunks


def pack_tokens(token_ids: list[int]) -> bytes:
    return array("i", token_ids).tobytes()


@dataclass
class MirrorSequence:
    tokens: list[int]
    computed: int
    media: list[MediaItem] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    histories: list[int] = field(default_factory=list)  # of each token: a digest of everything up to it
    digest: int = 0

    def __post_init__(self) -> None:
        covered = {
            item.offset + i: zlib.crc32(f"{item.content_hash} {i}".encode()) + 1
            for item in self.media
            for i in range(item.num_tokens)
        }
        for position, token in enumerate(self.tokens):
            self._digest(token + (covered.get(position, 0) << 20))

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self._digest(token)

    def _digest(self, value: int) -> None:
        self.digest = (self.digest * 1000003 + value + 1) & _MASK
        self.histories.append(self.digest)


class RankMirror:
    """Runs plans without computing anything; every slot remembers what was written to it."""

    def __init__(self, num_blocks: int, block_size: int, vocab_size: int, check_slots: bool = True) -> None:
        self.num_blocks, self.block_size, self.vocab_size = num_blocks, block_size, vocab_size
        self.sequences: dict[int, MirrorSequence] = {}
        self.slots: dict[int, int] = {}  # slot -> the history written there
        self.host: dict[int, list[int | None]] = {}  # place in host memory -> what the slots of a block held
        self.num_host_blocks = 1 << 30
        self.check_slots = check_slots
        self.encode_seconds = self.compute_seconds = 0.0  # what every step says it took
        self.step = 0

    def run(self, plan: StepPlan) -> StepResult:
        assert plan.step == self.step + 1, f"plan {plan.step} follows {self.step}"
        self.step = plan.step
        for seq_id in plan.dropped:
            del self.sequences[seq_id]
        for new in plan.added:
            assert new.seq_id not in self.sequences, f"sequence {new.seq_id} added twice"
            self.sequences[new.seq_id] = MirrorSequence(
                list(new.token_ids), new.num_computed_tokens, list(new.media)
            )
        self._copy_blocks(plan)
        self._hand_out_blocks(plan)
        tokens = [self._compute(chunk) for chunk in chunks_of(plan)]
        return StepResult(
            plan.step,
            pack_tokens([token for token in tokens if token is not None]),
            encode_seconds=self.encode_seconds,
            compute_seconds=self.compute_seconds,
            num_swapped_blocks=len(plan.swap_out) + len(plan.swap_in),
        )

    def next_token(self, sequence: MirrorSequence) -> int:
        return sequence.digest % self.vocab_size

    def _copy_blocks(self, plan: StepPlan) -> None:
        """Out first, then in; nothing may be copied to one place twice."""
        for block, place in plan.swap_out:
            assert 0 <= place < self.num_host_blocks, f"there is no place {place} in host memory"
            self.host[place] = [self.slots.get(slot) for slot in self._slots_of(block)]
        for place, block in plan.swap_in:
            self.slots.update(zip(self._slots_of(block), self.host[place], strict=True))
        for copies in (plan.swap_out, plan.swap_in):
            targets = [target for _, target in copies]
            assert len(set(targets)) == len(targets), f"two copies to one place: {copies}"

    def _slots_of(self, block: int) -> range:
        return range(block * self.block_size, (block + 1) * self.block_size)

    def _hand_out_blocks(self, plan: StepPlan) -> None:
        new_blocks = array("q", plan.new_blocks)
        for seq_id, block in zip(new_blocks[::2], new_blocks[1::2], strict=True):
            self.sequences[seq_id].blocks.append(block)
        for chunk in plan.chunks:
            self.sequences[chunk.seq_id].blocks += chunk.new_block_ids
        if self.check_slots:
            self._check_writers(plan)

    def _check_writers(self, plan: StepPlan) -> None:
        """Blocks may be shared, but not those that this step writes to."""
        users = Counter(block for sequence in self.sequences.values() for block in sequence.blocks)
        assert all(0 <= block < self.num_blocks for block in users)
        for chunk in chunks_of(plan):
            sequence = self.sequences[chunk.seq_id]
            assert len(set(sequence.blocks)) == len(sequence.blocks), "a sequence holds a block twice"
            for block in sequence.blocks[sequence.computed // self.block_size :]:
                assert users[block] == 1, f"block {block} is shared and {chunk} writes to it"

    def _compute(self, chunk: Chunk) -> int | None:
        sequence = self.sequences[chunk.seq_id]
        assert chunk.num_tokens >= 1, f"sequence {chunk.seq_id} has an empty chunk"
        end = sequence.computed + chunk.num_tokens
        assert end <= len(sequence.tokens), f"chunk of {chunk} ends beyond {len(sequence.tokens)} tokens"
        assert end <= len(sequence.blocks) * self.block_size, f"no block for the end of {chunk}"
        if self.check_slots:
            self._write_and_check(sequence, end)
        sequence.computed = end
        assert chunk.samples == (end == len(sequence.tokens))
        if not chunk.samples:
            return None
        token = self.next_token(sequence)
        sequence.append(token)
        return token

    def _write_and_check(self, sequence: MirrorSequence, end: int) -> None:
        slots = [block * self.block_size + i for block in sequence.blocks for i in range(self.block_size)]
        for position in range(sequence.computed, end):
            self.slots[slots[position]] = sequence.histories[position]
        for position in range(end):
            assert self.slots.get(slots[position]) == sequence.histories[position], (
                f"the slot of position {position} belongs to another history: "
                f"{self.slots.get(slots[position])}, expected {sequence.histories[position]}"
            )

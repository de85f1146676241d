"""The ranks' mirror of the live sequences, changed by each StepPlan and by sampled tokens.

Every rank keeps the same mirror, so that a plan needs to carry only changes. Which sequences run is the
engine's decision; tensors are made from the mirror in batch.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from engine.errors import EngineError
from engine.messages import Chunk, NewSequence, StepPlan
from workers.positions import Positions

UNKNOWN = -1  # a token that was sampled and has not come to the host yet


class IntList:
    """An int32 array that grows at its end without copying itself every time."""

    def __init__(self, values: Iterable[int] = ()) -> None:
        self._array = np.fromiter(values, np.int32)
        self._length = len(self._array)

    def __len__(self) -> int:
        return self._length

    def at(self, index: int) -> int:
        """The value of an index in [0, len)."""
        return int(self._array[index])

    def append(self, value: int) -> None:
        self._reserve(1)
        self._array[self._length] = value
        self._length += 1

    def extend(self, values: list[int]) -> None:
        if values:
            self._reserve(len(values))
            self._array[self._length : self._length + len(values)] = values
            self._length += len(values)

    def view(self) -> np.ndarray:
        """The values; valid until the next append or extend."""
        return self._array[: self._length]

    def _reserve(self, count: int) -> None:
        needed = self._length + count
        if needed > len(self._array):
            grown = np.empty(max(needed, 2 * len(self._array), 16), np.int32)
            grown[: self._length] = self.view()
            self._array = grown


class LiveSequence:
    """One sequence: its tokens, where its KV lives, and how far it is computed."""

    # [0, num_computed_tokens)             KV is in the blocks
    # [num_computed_tokens, num_tokens)    to be computed by the coming chunks
    def __init__(self, new: NewSequence) -> None:
        self.seq_id = new.seq_id
        self.sampling = new.sampling
        self.media = sorted(new.media, key=lambda item: item.offset)
        self.num_prompt_tokens = new.num_prompt_tokens
        self.num_computed_tokens = new.num_computed_tokens
        self.tokens = IntList(new.token_ids)  # prompt, then generated
        self.block_table = IntList()
        self.positions = Positions(len(new.token_ids), self.media)
        self.sample_row = -1  # of the last samples, when the last token is UNKNOWN

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    def learn(self, place: int, token_id: int) -> None:
        """The token at `place`, which was UNKNOWN."""
        self.tokens.view()[place] = token_id


class Sequences:
    """The live sequences by id."""

    def __init__(self) -> None:
        self._live: dict[int, LiveSequence] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[LiveSequence]:
        return iter(self._live.values())

    def __getitem__(self, seq_id: int) -> LiveSequence:
        try:
            return self._live[seq_id]
        except KeyError:
            raise EngineError(f"the plan names sequence {seq_id}, which was never added") from None

    def apply(self, plan: StepPlan) -> None:
        """Drop, then add (a preempted sequence may do both in one plan), then hand out new blocks."""
        for seq_id in plan.dropped:
            self._live.pop(seq_id, None)
        for new in plan.added:
            if new.seq_id in self._live:
                raise EngineError(f"the plan adds sequence {new.seq_id}, which is live; drop it first")
            self._live[new.seq_id] = LiveSequence(new)
        if plan.new_blocks:
            for seq_id, block_id in np.frombuffer(plan.new_blocks, np.int64).reshape(-1, 2).tolist():
                self[seq_id].block_table.append(block_id)
        for chunk in plan.chunks:
            self[chunk.seq_id].block_table.extend(chunk.new_block_ids)

    def finish_chunk(self, chunk: Chunk) -> LiveSequence:
        """Count the chunk's tokens as computed."""
        sequence = self[chunk.seq_id]
        sequence.num_computed_tokens += chunk.num_tokens
        return sequence


def chunks_of(plan: StepPlan) -> list[Chunk]:
    """Everything the step computes, in batch order: a decode is a chunk of one token that samples."""
    decoding = np.frombuffer(plan.decoding, np.int64).tolist()
    return [Chunk(seq_id, 1, [], True) for seq_id in decoding] + plan.chunks

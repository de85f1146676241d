"""The mirror of live sequences and the index arrays made from it."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from engine.errors import EngineError
from engine.messages import Chunk, MediaItem, NewSequence, SamplingParams, StepPlan
from tests.checks import python_lines
from tests.conftest import Rand
from workers.batch import BatchBuilder, HostBatch, build_batch
from workers.sequences import IntList, Sequences

GREEDY = SamplingParams(max_tokens=10, temperature=0.0)


def make_new(seq_id: int, token_ids: list[int], num_computed_tokens: int = 0) -> NewSequence:
    return NewSequence(seq_id, token_ids, len(token_ids), GREEDY, [], num_computed_tokens)


def batch_of(sequences: Sequences, plan: StepPlan, block_size: int = 4) -> HostBatch:
    sequences.apply(plan)
    live = [sequences[chunk.seq_id] for chunk in plan.chunks]
    batch = build_batch(plan.chunks, live, block_size, image_patch_id=90, num_pools=2)
    for chunk in plan.chunks:
        sequences.finish_chunk(chunk)
    return batch


def test_chunks_of_two_sequences_lie_one_after_the_other():
    added = [make_new(7, [10, 11, 12, 13, 14, 15]), make_new(8, [20, 95])]
    plan = StepPlan(0, [Chunk(7, 5, [3, 1], False), Chunk(8, 2, [6], True)], added)
    batch = batch_of(Sequences(), plan)
    assert batch.token_ids.tolist() == [10, 11, 12, 13, 14, 20, 95]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.slots.tolist() == [12, 13, 14, 15, 4, 24, 25]
    assert batch.token_types.tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert batch.block_tables.tolist() == [[3, 1], [6, 0]]
    assert batch.query_starts.tolist() == [0, 5, 7]
    assert batch.kv_lens.tolist() == [5, 2]
    assert batch.sample_rows.tolist() == [6]


def test_second_chunk_continues_where_the_first_ended():
    sequences = Sequences()
    batch_of(sequences, StepPlan(0, [Chunk(1, 3, [5], False)], [make_new(1, [10, 11, 12, 13, 14])]))
    batch = batch_of(sequences, StepPlan(1, [Chunk(1, 2, [2], True)]))
    assert batch.token_ids.tolist() == [13, 14]
    assert batch.slots.tolist() == [23, 8]
    assert batch.kv_lens.tolist() == [5]


def test_cached_prefix_is_not_computed_again():
    plan = StepPlan(0, [Chunk(1, 1, [9, 4], True)], [make_new(1, [10, 11, 12, 13, 14], 4)])
    batch = batch_of(Sequences(), plan)
    assert (batch.token_ids.tolist(), batch.slots.tolist()) == ([14], [16])


def test_sequence_dropped_and_added_in_one_plan_starts_afresh():
    sequences = Sequences()
    batch_of(sequences, StepPlan(0, [Chunk(1, 2, [5], True)], [make_new(1, [10, 11])]))
    plan = StepPlan(1, [Chunk(1, 3, [8], True)], [make_new(1, [10, 11, 12])], dropped=[1])
    batch = batch_of(sequences, plan)
    assert batch.slots.tolist() == [32, 33, 34]
    assert len(sequences) == 1


def test_dropping_a_sequence_that_never_came_changes_nothing():
    sequences = Sequences()
    sequences.apply(StepPlan(0, dropped=[3]))
    assert len(sequences) == 0


def test_adding_a_live_sequence_again_is_refused():
    sequences = Sequences()
    sequences.apply(StepPlan(0, added=[make_new(4, [1])]))
    with pytest.raises(EngineError, match="sequence 4, which is live"):
        sequences.apply(StepPlan(1, added=[make_new(4, [1])]))


def test_unknown_sequence_is_named():
    with pytest.raises(EngineError, match="sequence 5, which was never added"):
        Sequences().apply(StepPlan(0, [Chunk(5, 1, [0], True)]))


@pytest.mark.parametrize(("count", "blocks"), [(0, [1]), (5, [1, 2]), (4, [])])
def test_chunk_without_tokens_or_blocks_is_refused_before_it_can_write(count: int, blocks: list[int]):
    plan = StepPlan(0, [Chunk(1, count, blocks, True)], [make_new(1, [1, 2, 3, 4])])
    with pytest.raises(EngineError, match="of sequence 1"):
        batch_of(Sequences(), plan)


class Steps:
    """Random plans as an engine may make them, each built by a builder that saw those before, and afresh."""

    block_size, num_pools, image_patch_id = 4, 2, 90

    def __init__(self, rand: Rand) -> None:
        self.numpy = rand.numpy
        self.sequences = Sequences()
        self.builder = BatchBuilder(self.block_size, self.image_patch_id, self.num_pools)
        self.num_added = self.num_blocks = 0

    def add(self, num_tokens: int) -> StepPlan:
        self.num_added += 1
        new = make_new(self.num_added, self.numpy.integers(0, 99, num_tokens).tolist())
        return StepPlan(0, [self.chunk(new.seq_id, num_tokens, num_tokens, 0)], [new])

    def chunk(self, seq_id: int, num_tokens: int, end: int, num_blocks: int) -> Chunk:
        needed = -(-end // self.block_size) - num_blocks
        self.num_blocks += needed
        return Chunk(seq_id, num_tokens, list(range(self.num_blocks - needed, self.num_blocks)), True)

    def decode(self, seq_ids: list[int]) -> StepPlan:
        live = [self.sequences[seq_id] for seq_id in seq_ids]
        return StepPlan(
            0, [self.chunk(s.seq_id, 1, s.num_computed_tokens + 1, len(s.block_table)) for s in live]
        )

    def run(self, plan: StepPlan) -> None:
        self.sequences.apply(plan)
        live = [self.sequences[chunk.seq_id] for chunk in plan.chunks]
        made = self.builder.build(plan.chunks, live)
        afresh = build_batch(plan.chunks, live, self.block_size, self.image_patch_id, self.num_pools)
        for field in fields(HostBatch):
            left, right = getattr(made, field.name), getattr(afresh, field.name)
            assert left.dtype == right.dtype and left.tolist() == right.tolist(), field.name
        for chunk in plan.chunks:
            self.sequences.finish_chunk(chunk).tokens.append(int(self.numpy.integers(0, 99)))


def test_a_batch_made_from_the_last_one_is_the_same_as_one_made_afresh(rand: Rand):
    steps = Steps(rand)
    for num_tokens in (1, 4, 6, 3):
        steps.run(steps.add(num_tokens))
    for _ in range(60):
        count = int(steps.numpy.integers(1, 5))
        seq_ids = steps.numpy.permutation(4)[:count] + 1
        for _ in range(int(steps.numpy.integers(1, 12))):
            steps.run(steps.decode(seq_ids.tolist()))


def test_the_token_behind_an_image_has_the_position_that_the_image_leaves_to_it(rand: Rand):
    steps = Steps(rand)
    image = MediaItem("image", "", (1, 4, 6), 1, 6, "")  # its last token is at (1, 2, 3), text goes on at 4
    new = NewSequence(1, [5] * 7, 7, GREEDY, [image], num_computed_tokens=6)
    steps.run(StepPlan(0, [Chunk(1, 1, [0, 1], True)], [new]))
    steps.run(StepPlan(0, [Chunk(1, 1, [], True)]))


def test_decoding_on_inside_a_block_builds_nothing_afresh(rand: Rand, monkeypatch: pytest.MonkeyPatch):
    steps = Steps(rand)
    steps.run(steps.add(5))
    built: list[int] = []
    monkeypatch.setattr("workers.batch.build_batch", lambda *given: built.append(1) or build_batch(*given))
    for _ in range(8):
        steps.run(steps.decode([1]))
    assert len(built) == 3, "the first decode, and those that begin a block at 8 and at 12"


def test_sequences_of_one_length_that_take_turns_keep_their_own_slots(rand: Rand):
    steps = Steps(rand)
    for num_tokens in (5, 6):
        steps.run(steps.add(num_tokens))
    for seq_id in (2, 1, 1, 2):  # the last one goes on at 7, where the one before it would
        steps.run(steps.decode([seq_id]))


def test_a_batch_that_is_asked_for_again_is_the_same(rand: Rand):
    steps = Steps(rand)
    steps.run(steps.add(5))
    steps.run(steps.decode([1]))
    plan, live = steps.decode([1]), [steps.sequences[1]]
    first, second = (steps.builder.build(plan.chunks, live) for _ in range(2))
    assert first.kv_lens.tolist() == second.kv_lens.tolist() == [7]


def test_a_plan_for_more_tokens_than_there_are_is_refused_amid_decoding(rand: Rand):
    steps = Steps(rand)
    steps.run(steps.add(5))
    steps.run(steps.decode([1]))
    with pytest.raises(EngineError, match="computes 2 tokens of sequence 1"):
        steps.builder.build([Chunk(1, 2, [], True)], [steps.sequences[1]])


def test_a_decode_without_a_token_to_compute_is_refused(rand: Rand):
    steps = Steps(rand)
    steps.run(steps.add(5))
    steps.run(steps.decode([1]))
    plan, live = steps.decode([1]), [steps.sequences[1]]
    steps.builder.build(plan.chunks, live)
    steps.sequences.finish_chunk(plan.chunks[0])  # and nobody says what was sampled
    with pytest.raises(EngineError, match="of sequence 1"):
        steps.builder.build([Chunk(1, 1, [], True)], live)


def test_growing_list_keeps_its_values(rand: Rand):
    values = rand.numpy.integers(0, 1000, 300).tolist()
    grown = IntList(values[:3])
    for value in values[3:100]:
        grown.append(value)
    grown.extend(values[100:])
    assert grown.view().tolist() == values


def test_a_prefill_of_8k_tokens_runs_no_more_python_than_one_of_64():
    def lines(num_tokens: int) -> int:
        sequences = Sequences()
        decoding = [make_new(i, list(range(64)), 63) for i in range(255)]
        blocks = list(range(255, 255 + num_tokens // 64))
        chunks = [Chunk(i, 1, [i], True) for i in range(255)] + [Chunk(255, num_tokens, blocks, True)]
        sequences.apply(StepPlan(0, chunks, [*decoding, make_new(255, list(range(num_tokens)))]))
        live, batches = list(sequences), []
        count = python_lines(
            lambda: batches.append(build_batch(chunks, live, 64, image_patch_id=10**6, num_pools=2))
        )
        assert len(np.unique(batches[0].slots)) == 255 + num_tokens
        return count

    assert lines(8192) == lines(64)

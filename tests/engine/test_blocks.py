"""The books of KV blocks: who owns what, and in which order blocks are used again."""

from __future__ import annotations

from collections import Counter

import pytest

from engine.block_pool import BlockPool
from engine.errors import EngineError
from engine.kv_manager import KVManager
from engine.messages import SamplingParams
from engine.sequence import Sequence


def make_sequence(num_tokens: int = 10) -> Sequence:
    return Sequence(0, "r", b"api-0", [5] * num_tokens, num_tokens, 99, frozenset(), SamplingParams(9))


def test_taking_more_than_there_is_takes_nothing():
    pool = BlockPool(3)
    assert pool.try_take(4) is None
    assert pool.num_free == 3


def test_blocks_come_back_in_the_order_they_were_given_back():
    pool = BlockPool(4)
    pool.try_take(4)
    pool.give_back([2, 0, 3])
    assert pool.try_take(3) == [2, 0, 3]


def test_shared_block_is_free_only_when_its_last_owner_gave_it_back():
    pool = BlockPool(1)
    (block,) = pool.try_take(1)
    pool.share(block)
    pool.give_back([block])
    assert pool.num_free == 0
    pool.recount(Counter({block: 1}))
    pool.give_back([block])
    assert pool.num_free == 1


def test_sharing_a_free_block_takes_it_out_of_the_free_list():
    pool = BlockPool(2)
    pool.share(0)
    assert pool.try_take(2) is None and pool.try_take(1) == [1]


def test_giving_back_what_nobody_owns_is_an_error():
    with pytest.raises(EngineError, match="KV block 1 was given back"):
        BlockPool(2).give_back([1])


@pytest.mark.parametrize("owners", [Counter(), Counter({0: 2}), Counter({0: 1, 1: 1}), Counter({0: 1, 7: 1})])
def test_recount_notices_any_disagreement(owners):
    pool = BlockPool(3)
    pool.try_take(1)
    with pytest.raises(EngineError):
        pool.recount(owners)


def test_extending_takes_only_what_is_missing():
    kv, sequence = KVManager(num_blocks=4, block_size=4), make_sequence()
    assert kv.try_extend(sequence, 5) == [0, 1]
    assert kv.try_extend(sequence, 8) == []
    assert kv.try_extend(sequence, 9) == [2]
    assert (sequence.block_ids, sequence.num_slots) == ([0, 1, 2], 12)


def test_extending_without_room_changes_nothing():
    kv, sequence = KVManager(num_blocks=2, block_size=4), make_sequence()
    assert kv.try_extend(sequence, 9) is None
    assert (sequence.block_ids, kv.pool.num_free) == ([], 2)


def test_released_blocks_are_reused_from_the_end_of_the_sequence():
    kv, sequence = KVManager(num_blocks=3, block_size=4), make_sequence()
    kv.try_extend(sequence, 12)
    kv.release(sequence)
    assert kv.pool.try_take(3) == [2, 1, 0]


def test_can_ever_hold_counts_whole_blocks():
    kv = KVManager(num_blocks=2, block_size=4)
    assert kv.can_ever_hold(8) and not kv.can_ever_hold(9)


def test_recount_notices_a_block_in_two_tables():
    kv, first, second = KVManager(4, 4), make_sequence(), make_sequence()
    kv.try_extend(first, 8)
    kv.try_extend(second, 4)
    second.block_ids = [first.block_ids[0]]
    with pytest.raises(EngineError):
        kv.recount([first, second], [])


def test_recount_notices_blocks_of_a_sequence_that_does_not_run():
    kv, sequence = KVManager(4, 4), make_sequence()
    kv.try_extend(sequence, 4)
    with pytest.raises(EngineError, match="is not running but holds KV blocks"):
        kv.recount([], [sequence])

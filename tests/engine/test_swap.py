"""Blocks that lose their place on the device come back from host memory, when that is cheaper than
computing them again.
"""

from __future__ import annotations

import pytest

from engine.errors import EngineError
from engine.prefix_cache import BlockKey
from engine.swap_tier import SwapTier
from tests.engine.builders import SchedulerWorld, make_scheduler

FIRST, SECOND = [[start + i for i in range(40)] for start in (100, 200)]


def make_world(num_host_blocks: int = 32, **config) -> SchedulerWorld:
    """16 blocks of 4 tokens on the device: room for one prompt of 40 tokens and its answer, not for two."""
    return make_scheduler(num_blocks=16, num_host_blocks=num_host_blocks, **config)


def ask(world: SchedulerWorld, prompt: list[int]) -> int:
    """Serve it alone; how many of its tokens need not be computed."""
    request = world.add(prompt=prompt)
    world.run_until_idle()
    world.recount()
    return world.outputs[request][0].num_cached_tokens


def key(number: int) -> BlockKey:
    return BlockKey(b"hash %d" % number, b"parent", b"content %d" % number)


def test_prompt_pushed_off_the_device_comes_back_from_host_memory():
    world = make_world()
    ask(world, FIRST), ask(world, SECOND)
    assert ask(world, FIRST) == 36
    assert world.scheduler.kv.swap.num_returned > 0
    world.assert_empty()


@pytest.mark.parametrize("changes", [{"num_host_blocks": 0}, {"enable_prefix_caching": False}])
def test_without_host_memory_or_prefix_cache_nothing_is_copied(changes):
    world = make_world(**changes)
    ask(world, FIRST), ask(world, SECOND)
    assert ask(world, FIRST) < 36
    assert (world.ranks.host, len(world.scheduler.kv.swap)) == ({}, 0)


def test_answer_after_a_return_is_that_of_a_server_without_swapping():
    world, plain = make_world(), make_world(num_host_blocks=0)
    for prompt in (FIRST, SECOND, FIRST, SECOND):
        requests = [each.add(prompt=prompt, max_tokens=8) for each in (world, plain)]
        world.run_until_idle(), plain.run_until_idle()
        assert world.tokens(requests[0]) == plain.tokens(requests[1])


def test_preempted_sequence_gets_its_blocks_back_by_copies():
    world = make_world()
    older, younger = (world.add(prompt=prompt[:24], max_tokens=30) for prompt in (FIRST, SECOND))
    world.run_until_idle()
    assert world.scheduler.num_preemptions > 0
    assert world.scheduler.kv.swap.num_returned > 0
    alone = make_scheduler()
    twins = [alone.add(prompt=prompt[:24], max_tokens=30) for prompt in (FIRST, SECOND)]
    alone.run_until_idle()
    assert [world.tokens(older), world.tokens(younger)] == [alone.tokens(twin) for twin in twins]


def test_copies_that_take_longer_than_computing_are_not_made():
    world = make_world()
    world.scheduler.kv.swap.observe(num_copied=1, seconds=1.0)
    world.scheduler.kv.recompute_seconds = 1.9
    world.scheduler.pacing.token_seconds = 1.9 / 4
    ask(world, FIRST), ask(world, SECOND)
    assert world.ranks.host == {}
    world.scheduler.pacing.token_seconds = 2.1 / 4
    ask(world, FIRST), ask(world, SECOND)
    assert world.ranks.host != {}


def test_block_that_returned_is_not_copied_out_again():
    world = make_world()
    for prompt in (FIRST, SECOND, FIRST, SECOND):
        ask(world, prompt)
    num_saved = world.scheduler.kv.swap.num_saved
    for prompt in (FIRST, SECOND):
        ask(world, prompt)
    assert world.scheduler.kv.swap.num_saved - num_saved < 4, "whole prompts were copied out once more"


def test_least_recently_used_place_is_taken_first():
    tier = SwapTier(2)
    tier.save(key(1), 11), tier.save(key(2), 12)
    tier.take_copies()
    tier.save(key(1), 13)  # lies here already: only used again
    tier.save(key(3), 14)
    assert [tier.find(key(number)) is not None for number in (1, 2, 3)] == [True, False, True]
    assert tier.take_copies() == ([(14, 0)], [])


def test_place_in_the_plan_being_made_is_not_taken():
    tier = SwapTier(1)
    tier.save(key(1), 11)
    tier.take_copies()
    tier.keep([key(1)])
    tier.save(key(2), 12)
    tier.bring_back(key(1), 13)
    assert tier.take_copies() == ([], [(0, 13)])
    assert tier.find(key(2)) is None


def test_equal_hash_alone_is_no_hit():
    tier = SwapTier(1)
    tier.save(key(1), 11)
    assert tier.find(key(1)._replace(content=b"other")) is None


def test_recount_notices_a_place_with_two_keys():
    tier = SwapTier(2)
    tier.save(key(1), 11)
    tier.recount()
    tier._free.append(tier.find(key(1)))  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="2 places"):
        tier.recount()

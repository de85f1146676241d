"""Which beginnings of prompts need not be computed again, which must be, and what is thrown out first."""

from __future__ import annotations

import pytest

from engine.block_pool import BlockPool
from engine.errors import EngineError
from engine.messages import MediaItem
from engine.prefix_cache import BlockKey, PrefixCache, extend_keys
from tests.engine.builders import SchedulerWorld, make_scheduler

PROMPT = list(range(100, 110))  # two full blocks of four, and two tokens more


def image(content: str = "a", offset: int = 2, num_tokens: int = 4) -> MediaItem:
    return MediaItem("image", content, (1, 4, num_tokens), offset, num_tokens, "file")


def ask(world: SchedulerWorld, prompt: list[int] = PROMPT, max_tokens: int = 1, **changes) -> int:
    """Run one request to its end; returns how many tokens of its prompt came from the cache."""
    request = world.add(prompt=prompt, max_tokens=max_tokens, **changes)
    world.run_until_idle()
    world.assert_empty()
    return world.outputs[request][0].num_cached_tokens


def test_second_request_computes_only_what_follows_the_full_blocks():
    world = make_scheduler()
    first = world.add(prompt=PROMPT, max_tokens=3)
    assert world.step() == {first: 10}
    second = world.add(prompt=PROMPT, max_tokens=3)
    assert world.step() == {first: 1, second: 2}
    world.run_until_idle()
    assert world.tokens(first) == world.tokens(second)
    assert [world.outputs[one][0].num_cached_tokens for one in (first, second)] == [0, 8]
    world.assert_empty()


def test_blocks_are_shared_only_after_their_step_was_applied():
    world = make_scheduler()
    first, second = world.add(prompt=PROMPT, max_tokens=1), world.add(prompt=PROMPT, max_tokens=1)
    assert world.step() == {first: 10, second: 6}  # the step budget is 16
    assert world.outputs[first][0].num_cached_tokens == 0


def test_last_token_is_always_computed():
    world = make_scheduler()
    assert [ask(world, PROMPT[:8]) for _ in range(2)] == [0, 4]


def test_next_turn_of_a_chat_finds_the_generated_tokens_too():
    world = make_scheduler()
    answer_to = world.add(prompt=PROMPT, max_tokens=8)
    world.run_until_idle()
    turn = PROMPT + world.tokens(answer_to)
    assert ask(world, [*turn, 7, 8, 9]) == 16  # 17 of 18 tokens were computed


def test_a_sequence_that_stops_early_leaves_its_full_blocks():
    world = make_scheduler()
    left = world.add(prompt=PROMPT, max_tokens=40)
    world.step(), world.step(), world.step()
    world.abort(left)
    world.run_until_idle()
    assert ask(world) == 8


def test_blocks_of_a_step_that_was_not_applied_are_not_shared():
    world = make_scheduler()
    left = world.add(prompt=PROMPT)
    plan = world.plan()
    world.abort(left)
    world.run(plan)
    assert ask(world) == 0


@pytest.mark.parametrize(
    ("change", "cached"),
    [
        ({}, 8),
        ({"prompt": [*PROMPT[:5], 1, 1, 1, 1, 1]}, 4),
        ({"prompt": [1, *PROMPT[1:]]}, 0),
        ({"cache_salt": "another tenant"}, 0),
        ({"media": [image("b")]}, 0),
        ({"media": [image("a", offset=1)]}, 0),
        ({"media": [image("a", offset=2, num_tokens=3)]}, 0),
        ({"media": []}, 0),
    ],
)
def test_a_prefix_hits_only_when_tokens_media_and_salt_are_equal(change, cached):
    world = make_scheduler()
    ask(world, media=[image()])
    assert ask(world, **({"media": [image()]} | change)) == cached


def test_another_image_leaves_the_blocks_before_it_valid():
    world = make_scheduler()
    ask(world, media=[image("a", offset=5)])
    assert ask(world, media=[image("b", offset=5)]) == 4


def test_text_behind_another_image_is_not_shared():
    world = make_scheduler()
    ask(world, list(range(100, 120)), media=[image("a", offset=0)])
    assert ask(world, list(range(100, 120)), media=[image("b", offset=0)]) == 0


def test_equal_hash_with_other_content_is_no_hit():
    cache = PrefixCache()
    cache.enter(BlockKey(b"hash", b"parent", b"these tokens"), 3)
    assert cache.find([BlockKey(b"hash", b"parent", b"these tokens")]) == [3]
    assert cache.find([BlockKey(b"hash", b"parent", b"other tokens")]) == []
    assert cache.find([BlockKey(b"hash", b"others", b"these tokens")]) == []


def test_nothing_is_cached_when_it_is_off():
    world = make_scheduler(enable_prefix_caching=False)
    assert [ask(world), ask(world)] == [0, 0]
    assert len(world.scheduler.kv.cache) == 0


def test_prompts_used_longest_ago_are_forgotten_first():
    world = make_scheduler(num_blocks=6)
    old, new = [1, *PROMPT[1:]], [2, *PROMPT[1:]]
    ask(world, old), ask(world, new)
    assert ask(world, old) == 8  # now the other one is older
    ask(world, [3, *PROMPT[1:]])  # three blocks: the two that are free, and one of someone
    assert [ask(world, old), ask(world, new)] == [8, 4]


def test_end_of_a_prompt_is_forgotten_before_its_beginning():
    world = make_scheduler(num_blocks=6)
    ask(world, list(range(100, 116)))
    ask(world, list(range(200, 212)))  # three blocks: the two never used, and one of the first prompt's
    assert ask(world, list(range(100, 116))) == 12


def test_blocks_without_use_go_before_cached_ones():
    pool = BlockPool(4)
    pool.try_take(4)
    pool.give_back([0, 1])
    pool.give_back_unused([2, 3])
    assert pool.try_take(4) == [3, 2, 0, 1]


def test_blocks_in_use_are_never_forgotten():
    world = make_scheduler(num_blocks=6)
    ask(world)
    sharing = world.add(prompt=PROMPT, max_tokens=8)
    world.step()
    for first in range(3, 9):
        world.add(prompt=[first] * 4, max_tokens=2)
    world.run_until_idle()
    twin = make_scheduler(enable_prefix_caching=False)
    twin.add(prompt=PROMPT, max_tokens=8, request_id="twin")
    twin.run_until_idle()
    assert world.tokens(sharing) == twin.tokens("twin")
    assert world.scheduler.kv.cache.num_evictions > 0


def test_preempted_sequence_computes_again_only_what_was_lost():
    world = make_scheduler(num_blocks=6, block_size=4)
    old = world.add(prompt=[1] * 8, max_tokens=13)
    young = world.add(prompt=[2] * 8, max_tokens=6)
    while not world.sequence(young).num_preemptions:
        world.step()
    computed = []
    while steps := world.step():
        computed += [steps[young]] if young in steps else []
    assert world.last(old).finish_reason == world.last(young).finish_reason == "length"
    assert computed[0] == 9  # of 13: the other one needed all but the first of its blocks
    world.assert_empty()


def test_a_prefix_on_the_free_list_counts_as_taken_when_it_is_used_again():
    world = make_scheduler(num_blocks=4)
    ask(world, list(range(100, 112)))
    shared = world.add(prompt=list(range(100, 114)), max_tokens=1)
    other = world.add(prompt=[5] * 4, max_tokens=1)
    assert world.step() == {shared: 2}
    assert world.step() == {other: 4}
    world.run_until_idle()
    world.assert_empty()


def test_keys_do_not_depend_on_when_they_are_made():
    world = make_scheduler()
    at_once = world.add(prompt=list(range(50)), media=[image(offset=6), image("b", offset=21)])
    sequence = world.sequence(at_once)
    keys, sequence.block_keys = sequence.block_keys, []
    tokens, sequence.token_ids = sequence.token_ids, []
    for token in tokens:
        sequence.token_ids.append(token)
        extend_keys(sequence, 4)
    assert sequence.block_keys == keys and len(keys) == 12


def test_recount_notices_a_block_that_is_cached_as_something_else():
    world = make_scheduler()
    request = world.add(prompt=PROMPT, max_tokens=5)
    world.step()
    sequence = world.sequence(request)
    sequence.block_keys[0] = sequence.block_keys[1]
    with pytest.raises(EngineError, match="cached as something else"):
        world.recount()

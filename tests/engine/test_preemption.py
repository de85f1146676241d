"""Who gives way when blocks run out, and that everybody gets on all the same."""

from __future__ import annotations

from engine.kv_manager import KVManager
from engine.messages import SamplingParams
from engine.preemption import choose_victim
from engine.sequence import Sequence
from tests.engine.builders import make_scheduler


def make_running(kv: KVManager, seq_id: int, num_tokens: int, **changes) -> Sequence:
    sequence = Sequence(
        seq_id, f"r{seq_id}", b"api-0", [seq_id] * (num_tokens + 1), 1, 99, frozenset(), SamplingParams(9)
    )
    sequence.seniority = seq_id
    kv.try_extend(sequence, num_tokens)
    sequence.num_computed_tokens = num_tokens
    for name, value in changes.items():
        setattr(sequence, name, value)
    return sequence


def test_without_a_cache_the_one_with_least_to_compute_per_block_gives_way():
    kv = KVManager(num_blocks=32, block_size=4)
    long, short = make_running(kv, 0, 16), make_running(kv, 1, 5)
    assert choose_victim(kv, [long, short], 1, True) is short
    assert choose_victim(kv, [short, long], 4, True) is short  # 2.5 tokens per block, the long one 4


def test_with_a_cache_only_the_end_is_lost():
    kv = KVManager(num_blocks=32, block_size=4, caches_prefixes=True)
    long, short = make_running(kv, 0, 17), make_running(kv, 1, 4)
    assert choose_victim(kv, [long, short], 1, True) is long  # loses one token, the other four


def test_the_youngest_gives_way_among_equals():
    kv = KVManager(num_blocks=32, block_size=4)
    equals = [make_running(kv, seq_id, 8) for seq_id in range(3)]
    assert choose_victim(kv, equals, 1, True) is equals[2]


def test_the_least_urgent_gives_way_whatever_it_costs():
    kv = KVManager(num_blocks=32, block_size=4)
    urgent, idle = make_running(kv, 0, 2), make_running(kv, 1, 30, priority=1)
    assert choose_victim(kv, [urgent, idle], 1, True) is idle


def test_one_whose_blocks_others_hold_too_is_the_last_choice():
    kv = KVManager(num_blocks=32, block_size=4, caches_prefixes=True)
    shared, other = make_running(kv, 0, 4), make_running(kv, 1, 16)
    for block_id in shared.block_ids:
        kv.pool.share(block_id)
    assert choose_victim(kv, [shared, other], 1, True) is other


def test_one_that_came_back_is_spared_until_it_made_a_token():
    kv = KVManager(num_blocks=32, block_size=4)
    back, other = make_running(kv, 0, 4, num_tokens_at_preemption=5), make_running(kv, 1, 16)
    assert choose_victim(kv, [back, other], 1, True) is other
    assert choose_victim(kv, [back], 1, True) is None
    assert choose_victim(kv, [back, other], 1, False) is other
    back.token_ids.append(7)
    assert choose_victim(kv, [back, other], 1, True) is back


def test_every_preemption_is_followed_by_progress():
    world = make_scheduler(num_blocks=9, block_size=4, max_num_batched_tokens=6, max_num_seqs=6)
    requests = [world.add(prompt=[n + 3] * 6, max_tokens=20) for n in range(6)]
    at_preemption: dict[str, list[int]] = {}
    for _ in range(2000):
        before = {one.request_id: one.num_preemptions for one in world.scheduler.running}
        oldest = world.scheduler.running[0].request_id if world.scheduler.running else None
        planned = world.step()
        assert not oldest or oldest in planned, f"the oldest, {oldest}, did not advance"
        world.recount()
        for one in world.scheduler.waiting:
            if one.num_preemptions > before.get(one.request_id, one.num_preemptions):
                at_preemption.setdefault(one.request_id, []).append(one.num_tokens)
        if not planned:
            break
    assert [len(world.tokens(request)) for request in requests] == [20] * 6
    assert any(len(lengths) > 1 for lengths in at_preemption.values()), "nobody was preempted twice"
    for lengths in at_preemption.values():
        assert lengths == sorted(set(lengths)), f"preempted twice without a token in between: {lengths}"
    world.assert_empty()


def test_one_that_comes_back_takes_its_old_place_in_line():
    world = make_scheduler(num_blocks=4, block_size=4, enable_prefix_caching=False)
    old, young = world.add(prompt_len=6, max_tokens=9), world.add(prompt_len=6, max_tokens=9)
    while not world.sequence(young).num_preemptions:
        world.step()
    world.abort(old)
    later = world.add(prompt_len=1, max_tokens=9)
    world.step(), world.step()
    assert [one.request_id for one in world.scheduler.running] == [young, later]

"""Who gets in when not everybody fits: small past large, but not for ever; tenants by turns; deadlines."""

from __future__ import annotations

from engine.pacing import Pacing
from tests.engine.builders import SchedulerWorld, make_scheduler


def crowd(**config) -> SchedulerWorld:
    """Prompts of equal tokens must not profit from each other here."""
    return make_scheduler(enable_prefix_caching=False, **config)


def test_a_small_request_passes_a_large_one_that_does_not_fit():
    world = crowd(num_blocks=8, block_size=4, max_num_batched_tokens=64)
    running = world.add(prompt_len=14, max_tokens=6)
    world.step()
    large, small = world.add(prompt_len=24, max_tokens=2), world.add(prompt_len=4, max_tokens=2)
    assert world.step() == {running: 1, small: 4}
    assert world.sequence(large).is_waiting
    world.run_until_idle()
    assert len(world.tokens(large)) == 2
    world.assert_empty()


def test_a_large_request_is_not_passed_for_ever():
    world = crowd(num_blocks=8, block_size=4, max_num_batched_tokens=64)
    world.add(prompt_len=4, max_tokens=1)
    large = None
    admitted_after = 0
    for number in range(200):
        world.add(prompt_len=4, max_tokens=6)
        if number == 5:
            large = world.add(prompt_len=28, max_tokens=2)
        world.step()
        if large and not world.sequence(large).is_waiting:
            break
        admitted_after += bool(large)
    assert 0 < admitted_after < 60, f"the large request was still waiting after {admitted_after} steps"
    world.run_until_idle()
    world.assert_empty()


def test_nobody_passes_a_preempted_sequence():
    world = crowd(num_blocks=4, block_size=4)
    old, young = world.add(prompt_len=6, max_tokens=9), world.add(prompt_len=6, max_tokens=9)
    while not world.sequence(young).num_preemptions:
        world.step()
    small = world.add(prompt_len=1, max_tokens=1)
    assert small not in world.step()
    world.run_until_idle()
    assert [len(world.tokens(one)) for one in (old, young, small)] == [9, 9, 1]


def test_a_flood_of_one_tenant_delays_another_by_one_request():
    world = crowd(max_num_seqs=1)
    flood = [world.add(prompt_len=4, max_tokens=2, tenant="flood") for _ in range(20)]
    order = []

    def step() -> None:
        order.extend(request for request in world.step() if request not in order)

    step()
    calm = world.add(prompt_len=4, max_tokens=2, tenant="calm")
    while calm not in order:
        step()
    assert order == [flood[0], calm]


def test_tenants_get_tokens_by_weight():
    world = crowd(max_num_seqs=1, tenant_weights={"double": 2.0})
    for _ in range(60):
        world.add(prompt_len=4, max_tokens=2, tenant="double")
        world.add(prompt_len=4, max_tokens=2, tenant="single")
    order = []
    while len(order) < 30:
        names = {one.request_id: one.tenant for one in (*world.scheduler.running, *world.scheduler.waiting)}
        order += [names[request] for request, count in world.step().items() if count == 4]
    assert abs(order.count("double") - 20) <= 1, order


def test_answer_that_is_under_way_ends_at_its_deadline_with_what_it_has():
    world = crowd()
    request = world.add(prompt_len=4, max_tokens=50, timeout=3.5)
    world.run_until_idle()
    assert world.last(request).finish_reason == "length"
    assert len(world.tokens(request)) == 3
    world.assert_empty()


def test_request_that_waits_past_its_deadline_gets_a_504():
    world = crowd(max_num_seqs=1)
    world.add(prompt_len=4, max_tokens=30)
    late = world.add(prompt_len=4, max_tokens=30, timeout=2.5)
    world.run_until_idle()
    assert (world.last(late).finish_reason, world.last(late).error_status) == ("error", 504)
    assert "2.5 s passed" in world.last(late).error
    world.assert_empty()


def test_deadlines_of_finished_requests_do_not_pile_up():
    world = crowd()
    for _ in range(500):
        world.add(prompt_len=1, max_tokens=1, timeout=1e9)
        world.step()
    assert len(world.scheduler._live.deadlines) < 100


def test_steps_without_times_leave_prompts_unbounded():
    assert Pacing(0.2, 2048).num_prefill_tokens == 2048


def test_prompts_get_what_the_target_leaves_beside_decodes():
    pacing = Pacing(target=0.1, at_most=2048)
    for _ in range(50):
        pacing.observe(0.02, 0)
        pacing.observe(0.02 + 500 * 0.001, 500)  # a millisecond per prompt token
    assert 75 <= pacing.num_prefill_tokens <= 80


def test_prompts_get_as_long_as_decodes_when_these_alone_miss_the_target():
    pacing = Pacing(target=0.1, at_most=2048)
    for _ in range(50):
        pacing.observe(0.3, 0)
        pacing.observe(0.3 + 500 * 0.001, 500)
    assert 295 <= pacing.num_prefill_tokens <= 300


def test_a_prompt_goes_on_however_small_the_target():
    pacing = Pacing(target=1e-6, at_most=2048)
    pacing.observe(1e-5, 0)
    pacing.observe(1.0, 100)
    assert pacing.num_prefill_tokens == 16


def test_long_prompts_are_cut_smaller_while_answers_are_under_way():
    world = crowd(max_num_batched_tokens=32, max_prefill_tokens_per_step=5)
    long = world.add(prompt_len=40, max_tokens=1)
    assert world.step() == {long: 32}  # nobody waits for a token
    world.run_until_idle()
    answering = world.add(prompt_len=4, max_tokens=30)
    world.step()
    long = world.add(prompt_len=12, max_tokens=1)
    assert [world.step() for _ in range(3)] == [
        {answering: 1, long: 5},
        {answering: 1, long: 5},
        {answering: 1, long: 2},
    ]

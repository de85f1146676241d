"""Steps that overlap: step n+1 is planned before the result of step n is applied."""

from __future__ import annotations

import pytest

from engine.messages import StepPlan
from tests.engine.builders import EOS, SchedulerWorld, make_scheduler
from tests.engine.fakes import chunks_of


def make_late(**changes) -> SchedulerWorld:
    world = make_scheduler(**changes)
    world.overlap = True
    return world


def tokens_of(plan: StepPlan | None) -> dict[int, int]:
    return {chunk.seq_id: chunk.num_tokens for chunk in chunks_of(plan)} if plan else {}


def test_token_that_nobody_knows_yet_is_computed_by_the_next_step():
    world = make_late()
    request = world.add(prompt_len=5, max_tokens=4)
    assert [world.step() for _ in range(4)] == [{request: 5}, {request: 1}, {request: 1}, {request: 1}]
    assert len(world.tokens(request)) == 3  # the last one is in flight
    world.run_until_idle()
    alone = make_scheduler()
    twin = alone.add(prompt_len=5, max_tokens=4)
    alone.run_until_idle()
    assert world.tokens(request) == alone.tokens(twin)
    world.assert_empty()


def test_end_by_length_is_known_beforehand_and_costs_no_slot():
    world = make_late()
    request = world.add(prompt_len=5, max_tokens=2)
    assert [world.step() for _ in range(2)] == [{request: 5}, {request: 1}]
    plan = world.plan()
    assert tokens_of(plan) == {} and world.last(request).finish_reason == "length"


def test_sequence_that_turns_out_finished_costs_one_slot_and_no_token():
    world = make_late()
    request, other = world.add(prompt_len=5, max_tokens=9), world.add(prompt_len=7, max_tokens=9)
    world.step()
    sequence = world.sequence(request)
    ordinary = world.ranks.next_token
    world.ranks.next_token = lambda one: EOS if len(one.tokens) == 6 else ordinary(one)
    world.step()
    assert world.step() == {request: 1, other: 1}  # in vain, as the end token is applied only now
    assert world.last(request).finish_reason == "stop" and sequence.is_finished
    assert world.step() == {other: 1}
    world.run_until_idle()
    assert len(world.tokens(request)) == 1 and len(world.tokens(other)) == 9
    world.assert_empty()


def test_first_token_that_ends_the_answer_takes_one_slot_with_it():
    world = make_late()
    world.ranks.next_token = lambda one: EOS
    request = world.add(prompt_len=5, max_tokens=9)
    assert [world.step() for _ in range(2)] == [{request: 5}, {request: 1}]
    assert world.last(request).stop_token_id == EOS and world.tokens(request) == []
    world.run_until_idle()
    world.assert_empty()


def test_preempted_sequence_keeps_the_token_that_was_in_flight():
    world = make_late(num_blocks=4, block_size=4, enable_prefix_caching=False)
    old, young = world.add(prompt_len=7, max_tokens=6), world.add(prompt_len=6, max_tokens=6)
    while not world.scheduler.num_preemptions:
        world.step()
    victim = world.sequence(young)
    assert victim.is_waiting and victim.num_output_tokens == len(world.tokens(young)) > 0
    world.run_until_idle()
    for request, length in ((old, 7), (young, 6)):
        alone = make_scheduler()
        twin = alone.add(prompt_len=length, max_tokens=6)
        alone.run_until_idle()
        assert world.tokens(request) == alone.tokens(twin)
    world.assert_empty()


def test_block_can_be_shared_only_when_the_step_that_fills_it_was_applied():
    world = make_late(block_size=4)
    world.add(prompt_len=9, max_tokens=9)
    world.step()
    second = world.add(prompt_len=9, max_tokens=1)
    assert world.step()[second] == 9  # the first step is not applied while this one is planned
    third = world.add(prompt_len=9, max_tokens=1)
    assert world.step()[third] == 1


def test_abort_between_two_steps_in_flight_leaves_nothing():
    world = make_late()
    request, other = world.add(prompt_len=9, max_tokens=9), world.add(prompt_len=2, max_tokens=3)
    world.step()
    plan = world.plan()
    world.abort(request)
    world.recount()
    world.run(plan)
    assert world.step() == {other: 1}
    world.run_until_idle()
    assert [output.finish_reason for output in world.outputs[request]] == ["abort"]
    world.assert_empty()


def test_third_plan_has_to_wait_for_a_result():
    world = make_late()
    world.add(prompt_len=3, max_tokens=9)
    world.scheduler.schedule(1.0), world.scheduler.schedule(2.0)
    assert world.scheduler.num_steps_in_flight == 2
    with pytest.raises(AssertionError, match="apply a result first"):
        world.scheduler.schedule(3.0)

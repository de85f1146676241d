"""What an outsider sees of the scheduler: who computes when, what comes out, who owns which block."""

from __future__ import annotations

import pytest

from engine.errors import EngineError
from engine.messages import MediaItem, StepResult
from tests.engine.builders import CLIENT, EOS, make_request, make_scheduler
from tests.engine.fakes import chunks_of, pack_tokens
from tests.engine.outputs import said_by


def test_nothing_is_planned_without_requests():
    assert make_scheduler().plan() is None


def test_prompt_is_computed_in_one_step_and_then_one_token_per_step():
    world = make_scheduler()
    request = world.add(prompt_len=7, max_tokens=3)
    assert [world.step() for _ in range(3)] == [{request: 7}, {request: 1}, {request: 1}]
    assert len(world.tokens(request)) == 3
    assert world.last(request).finish_reason == "length"
    world.run_until_idle()
    world.assert_empty()


def test_long_prompt_is_cut_into_chunks_of_the_step_budget():
    world = make_scheduler(max_num_batched_tokens=16)
    request = world.add(prompt_len=40, max_tokens=1)
    assert [world.step()[request] for _ in range(3)] == [16, 16, 8]
    assert len(world.tokens(request)) == 1


def test_whole_prompt_waits_for_its_own_step_when_chunking_is_off():
    world = make_scheduler(
        max_num_batched_tokens=16, enable_chunked_prefill=False, enable_prefix_caching=False
    )
    first, second = world.add(prompt_len=10, max_tokens=5), world.add(prompt_len=10, max_tokens=5)
    assert world.step() == {first: 10}
    assert world.step() == {first: 1, second: 10}


def test_running_sequences_compute_before_waiting_ones():
    world = make_scheduler(max_num_batched_tokens=8)
    first = world.add(prompt_len=4, max_tokens=8)
    world.step()
    second = world.add(prompt_len=20, max_tokens=8)
    assert world.step() == {first: 1, second: 7}


def test_long_prefill_leaves_a_token_for_every_sequence_behind_it():
    world = make_scheduler(max_num_batched_tokens=8)
    long, short = world.add(prompt_len=24, max_tokens=2), world.add(prompt_len=2, max_tokens=9)
    assert world.step() == {long: 8}
    world.abort(long)
    world.step()
    long = world.add(prompt_len=24, max_tokens=2)
    assert world.step() == {short: 1, long: 7}
    assert world.step() == {short: 1, long: 7}


def test_admission_stops_at_max_num_seqs():
    world = make_scheduler(max_num_seqs=2)
    requests = [world.add(prompt_len=2, max_tokens=3) for _ in range(3)]
    assert set(world.step()) == set(requests[:2])
    assert world.sequence(requests[2]).is_waiting
    world.run_until_idle()
    assert [len(world.tokens(request)) for request in requests] == [3, 3, 3]
    world.assert_empty()


def test_no_more_sequences_run_than_the_budget_has_tokens():
    world = make_scheduler(max_num_batched_tokens=3, max_num_seqs=8)
    requests = [world.add(prompt_len=1, max_tokens=20) for _ in range(6)]
    world.step()
    assert set(world.step()) == set(requests[:3])


def test_second_request_waits_when_blocks_run_out():
    world = make_scheduler(
        num_blocks=3, block_size=16, max_num_batched_tokens=64, enable_prefix_caching=False
    )
    first, second = world.add(prompt_len=48, max_tokens=1), world.add(prompt_len=48, max_tokens=1)
    assert world.step() == {first: 48}
    assert world.sequence(second).is_waiting
    assert world.step() == {second: 48}
    world.recount()


def test_blocks_are_taken_when_a_token_needs_them_and_not_before():
    world = make_scheduler(num_blocks=4, block_size=4)
    request = world.add(prompt_len=4, max_tokens=6)
    held = []
    while world.step():
        held += [len(one.block_ids) for one in world.scheduler.running]
    assert held == [1, 2, 2, 2, 2]
    assert len(world.tokens(request)) == 6


def test_last_admitted_is_preempted_and_computes_everything_again():
    world = make_scheduler(num_blocks=4, block_size=4)
    alone = make_scheduler(num_blocks=4, block_size=4)
    old, young = world.add(prompt_len=6, max_tokens=9), world.add(prompt_len=6, max_tokens=9)
    alone.add(prompt_len=6, max_tokens=9)
    alone.run_until_idle()
    world.step(), world.step(), world.step()  # both hold two full blocks now
    assert world.step() == {old: 1}
    assert world.sequence(young).is_waiting and world.sequence(young).num_preemptions == 1
    world.recount()
    world.run_until_idle()
    assert world.tokens(old) == world.tokens(young) == alone.tokens("r0")
    world.assert_empty()


def test_preempted_sequence_is_next_even_before_a_higher_priority():
    world = make_scheduler(num_blocks=4, block_size=4)
    world.add(prompt_len=6, max_tokens=9)
    young = world.add(prompt_len=6, max_tokens=9)
    while not world.sequence(young).num_preemptions:
        world.step()
    urgent = world.add(prompt_len=6, max_tokens=2, priority=-5)
    order = []
    while steps := world.step():
        order += [request for request in steps if request not in order]
    assert order[-2:] == [young, urgent]
    world.assert_empty()


def test_higher_priority_is_admitted_before_an_earlier_arrival():
    world = make_scheduler(max_num_seqs=1)
    late_urgent = [world.add(max_tokens=1), world.add(max_tokens=1, priority=-1)][1]
    assert world.step() == {late_urgent: 4}


def test_oldest_is_never_preempted_under_pressure():
    world = make_scheduler(num_blocks=5, block_size=4, max_num_seqs=4)
    requests = [world.add(prompt_len=4, max_tokens=16) for _ in range(4)]
    for _ in range(16):
        assert requests[0] in world.step()
    assert world.last(requests[0]).finish_reason == "length"
    assert world.scheduler.num_preemptions > 0
    world.run_until_idle()
    assert [len(world.tokens(request)) for request in requests] == [16] * 4
    world.assert_empty()


def test_second_long_prompt_is_not_admitted_into_blocks_promised_to_the_first():
    world = make_scheduler(num_blocks=12, block_size=4, max_num_batched_tokens=16)
    first, second = world.add(prompt_len=40, max_tokens=1), world.add(prompt_len=16, max_tokens=1)
    world.step()
    assert world.sequence(second).is_waiting
    world.run_until_idle()
    assert world.scheduler.num_preemptions == 0
    assert len(world.tokens(first)) == len(world.tokens(second)) == 1


def test_request_that_can_never_fit_gets_an_error_and_others_go_on():
    world = make_scheduler(num_blocks=4, block_size=4)
    impossible, fine = world.add(prompt_len=20, max_tokens=8), world.add(prompt_len=4, max_tokens=2)
    assert world.last(impossible).finish_reason == "error"
    assert "do not fit into the KV cache of 16 tokens" in world.last(impossible).error
    world.run_until_idle()
    assert len(world.tokens(fine)) == 2
    world.assert_empty()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": [10] * 64}, "leaves no room"),
        ({"prompt": [10, 10_000]}, "outside [0, 10000)"),
        ({"prompt": [-1]}, "outside [0, 10000)"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_len": 4, "media": [MediaItem("image", "h", (1, 2, 2), 2, 4, "f")]}, "beyond the end"),
        ({"prompt_len": 4, "media": [MediaItem("image", "h", (1, 2, 2), 0, 0, "f")]}, "misplaced"),
        ({"prompt": ["a"]}, "could not take"),
    ],
)
def test_bad_request_is_its_own_error(change, words):
    world = make_scheduler()
    bad = world.add(**change)
    assert world.last(bad).finish_reason == "error" and words in world.last(bad).error
    assert world.plan() is None
    world.assert_empty()


def test_empty_prompt_is_refused():
    world = make_scheduler()
    request = make_request("empty")
    request.prompt_token_ids.clear()
    world.scheduler.add(CLIENT, request, world.now)
    (output,) = said_by(world.scheduler)
    assert output.error == "the prompt is empty" and output.error_status == 400


def test_request_id_in_use_is_refused_and_the_first_goes_on():
    world = make_scheduler()
    world.add(prompt_len=4, max_tokens=2, request_id="same")
    world.add(prompt_len=4, max_tokens=2, request_id="same")
    refusal = world.outputs.pop("same")
    assert "already in use" in refusal[0].error
    world.run_until_idle()
    assert len(world.tokens("same")) == 2
    world.assert_empty()


def test_full_queue_refuses_with_429():
    world = make_scheduler(max_waiting=1)
    world.add()
    refused = world.add()
    assert world.last(refused).error_status == 429


def test_end_token_stops_and_is_not_among_the_output():
    world = make_scheduler(vocab_size=10_000)
    request = world.add(prompt_len=4, max_tokens=10)
    _sample(world, 500), _sample(world, EOS)
    assert world.tokens(request) == [500]
    assert (world.last(request).finish_reason, world.last(request).stop_token_id) == ("stop", EOS)
    world.recount()


def test_end_token_is_ordinary_when_ignored_or_too_early():
    world = make_scheduler()
    ignoring = world.add(prompt_len=4, max_tokens=2, sampling={"ignore_eos": True})
    patient = world.add(prompt_len=4, max_tokens=3, sampling={"min_tokens": 2})
    _sample(world, EOS), _sample(world, EOS)
    assert world.tokens(ignoring) == [EOS, EOS] and world.last(ignoring).finish_reason == "length"
    _sample(world, EOS)
    assert world.tokens(patient) == [EOS, EOS] and world.last(patient).finish_reason == "stop"


def test_own_stop_token_stops_even_when_the_model_end_is_ignored():
    world = make_scheduler()
    request = world.add(max_tokens=9, sampling={"ignore_eos": True, "stop_token_ids": (77,)})
    _sample(world, EOS), _sample(world, 77)
    assert world.tokens(request) == [EOS] and world.last(request).stop_token_id == 77


def test_output_ends_at_the_context_length():
    world = make_scheduler(max_model_len=10)
    request = world.add(prompt_len=7, max_tokens=100)
    world.run_until_idle()
    assert len(world.tokens(request)) == 3 and world.last(request).finish_reason == "length"


def test_abort_frees_everything_within_one_step():
    world = make_scheduler()
    running, waiting = world.add(prompt_len=20, max_tokens=9), world.add(prompt_len=20, max_tokens=9)
    world.step()
    world.abort(running), world.abort(waiting)
    assert world.scheduler.kv.pool.num_free == 64
    world.step()
    world.assert_empty()
    assert world.last(running).finish_reason == world.last(waiting).finish_reason == "abort"


def test_token_of_a_sequence_aborted_during_the_step_is_nobodys():
    world = make_scheduler()
    left, stays = world.add(prompt_len=4, max_tokens=3), world.add(prompt_len=4, max_tokens=3)
    plan = world.plan()
    world.abort(left)
    world.run(plan)
    assert world.tokens(left) == [] and len(world.tokens(stays)) == 1
    world.run_until_idle()
    world.assert_empty()


def test_blocks_of_an_aborted_sequence_serve_the_next_step():
    world = make_scheduler(num_blocks=4, block_size=4)
    left, follower = world.add(prompt_len=14, max_tokens=1), world.add(prompt_len=14, max_tokens=2)
    plan = world.plan()
    world.abort(left)
    world.run(plan)
    assert world.step() == {follower: 14}
    world.run_until_idle()
    world.assert_empty()


def test_unknown_abort_is_ignored():
    world = make_scheduler()
    world.abort("never seen")
    world.assert_empty()


def test_requests_of_a_client_that_left_are_aborted():
    world = make_scheduler()
    world.add(), world.scheduler.add(b"api-1", make_request("other"), world.now)
    world.scheduler.abort_client(CLIENT)
    assert [sequence.request_id for sequence in world.scheduler.waiting] == ["other"]


def test_every_request_gets_an_error_when_the_ranks_are_gone():
    world = make_scheduler(max_num_seqs=1)
    world.add(), world.add()
    world.step()
    world.scheduler.fail_all("rank 3 died", 503)
    outputs = said_by(world.scheduler)
    assert {(one.request_id, one.error, one.error_status) for one in outputs} == {
        ("r0", "rank 3 died", 503),
        ("r1", "rank 3 died", 503),
    }
    world.recount()


def test_first_output_tells_the_time_in_the_queue():
    world = make_scheduler()
    request = world.add(max_tokens=2, arrival=98.5)
    world.run_until_idle()
    first, second = world.outputs[request]
    assert (first.queue_seconds, second.queue_seconds) == (2.5, 0.0)


def test_arrival_that_is_no_time_counts_as_now():
    world = make_scheduler()
    strange = [world.add(arrival=arrival) for arrival in (float("nan"), float("inf"), -1.0, 1e30)]
    assert [world.sequence(request).arrival for request in strange] == [world.now] * 4


@pytest.mark.parametrize("tokens", [[], [5, 6]])
def test_wrong_number_of_tokens_is_the_engines_error(tokens):
    world = make_scheduler()
    world.add()
    plan = world.plan()
    with pytest.raises(EngineError, match="expected 1"):
        world.scheduler.apply(StepResult(plan.step, pack_tokens(tokens)), world.now)


def test_answer_to_another_step_is_the_engines_error():
    world = make_scheduler()
    world.add()
    plan = world.plan()
    with pytest.raises(EngineError, match="expected step 1"):
        world.scheduler.apply(StepResult(plan.step + 1, pack_tokens([5])), world.now)


def test_probe_is_an_empty_plan_that_is_answered_like_any_other():
    world = make_scheduler()
    plan = world.scheduler.probe()
    assert not plan.has_work
    world.run(plan)
    world.assert_empty()


def test_recount_notices_a_block_with_a_forgotten_owner():
    world = make_scheduler()
    request = world.add(prompt_len=8)
    world.step()
    world.sequence(request).block_ids.pop()
    with pytest.raises(EngineError):
        world.recount()


def _sample(world, token: int) -> None:
    """One step in which every sampling sequence gets `token`."""
    plan = world.plan()
    tokens = [token for chunk in chunks_of(plan) if chunk.samples]
    world.scheduler.apply(StepResult(plan.step, pack_tokens(tokens)), world.now)
    world._collect()

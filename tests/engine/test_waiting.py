"""Who is next: preempted first, then by priority, then by arrival."""

from __future__ import annotations

from engine.budget import StepBudget
from engine.fairness import Accounts
from engine.messages import SamplingParams
from engine.sequence import Sequence
from engine.waiting import WaitingQueue
from tests.engine.builders import make_config


def make_sequence(seq_id: int, **changes) -> Sequence:
    sampling = SamplingParams(9)
    return Sequence(seq_id, f"r{seq_id}", b"api-0", [5], 1, 9, frozenset(), sampling, **changes)


def drain(queue: WaitingQueue) -> list[int]:
    order = []
    while sequence := queue.first():
        order.append(sequence.seq_id)
        queue.drop(sequence)
    return order


def test_priority_goes_before_arrival_and_arrival_before_order():
    queue = WaitingQueue(9)
    for seq_id, priority, arrival in [(0, 1, 0.0), (1, 0, 5.0), (2, 0, 3.0), (3, 0, 3.0), (4, -1, 9.0)]:
        queue.try_add(make_sequence(seq_id, priority=priority, arrival=arrival))
    assert drain(queue) == [4, 2, 3, 1, 0]


def test_looking_at_the_first_does_not_remove_it():
    queue = WaitingQueue(9)
    queue.try_add(make_sequence(0))
    assert queue.first() is queue.first() is not None
    assert len(queue) == 1


def test_preempted_sequences_come_first_in_the_order_in_which_they_once_began():
    queue = WaitingQueue(9)
    queue.try_add(make_sequence(0, priority=-9))
    queue.put_back(make_sequence(1, seniority=5))
    queue.put_back(make_sequence(2, seniority=7))
    queue.put_back(make_sequence(3, seniority=4))
    assert drain(queue) == [3, 1, 2, 0]


def test_full_queue_refuses_newcomers_and_takes_the_preempted():
    queue = WaitingQueue(1)
    assert queue.try_add(make_sequence(0))
    assert not queue.try_add(make_sequence(1))
    queue.put_back(make_sequence(2))
    assert drain(queue) == [2, 0]


def test_dropped_sequences_are_never_first():
    queue = WaitingQueue(9)
    sequences = [make_sequence(seq_id) for seq_id in range(3)]
    for sequence in sequences:
        queue.try_add(sequence)
    queue.drop(sequences[0])
    queue.drop(sequences[2])
    assert drain(queue) == [1]


def test_sequence_preempted_twice_keeps_its_place():
    queue, old, young = WaitingQueue(9), make_sequence(0), make_sequence(1)
    queue.put_back(young)
    queue.drop(young)  # admitted again
    queue.put_back(young)
    queue.put_back(old)
    assert drain(queue) == [0, 1]


def test_aborted_newcomers_do_not_pile_up():
    queue = WaitingQueue(10_000)
    queue.try_add(make_sequence(0, priority=-1))
    for seq_id in range(1, 5000):
        sequence = make_sequence(seq_id)
        queue.try_add(sequence)
        queue.drop(sequence)
    assert len(queue) == 1 and queue._num_entries < 200
    assert drain(queue) == [0]


def test_those_passed_over_keep_their_place():
    queue = WaitingQueue(9)
    for seq_id in range(4):
        queue.try_add(make_sequence(seq_id, arrival=seq_id))
    queue.put_back(make_sequence(9))
    walk = queue.candidates()
    assert [next(walk).seq_id for _ in range(4)] == [9, 0, 1, 2]
    walk.close()
    assert drain(queue) == [9, 0, 1, 2, 3]


def test_the_one_just_got_may_be_dropped_during_the_walk():
    queue = WaitingQueue(9)
    for seq_id in range(4):
        queue.try_add(make_sequence(seq_id, arrival=seq_id))
    walk = queue.candidates()
    for sequence in walk:
        if sequence.seq_id % 2:
            queue.drop(sequence)
    assert drain(queue) == [0, 2]


def test_classes_that_nobody_waits_in_are_forgotten():
    queue = WaitingQueue(10_000)
    for seq_id in range(5000):
        queue.try_add(make_sequence(seq_id, priority=seq_id))
    walk = queue.candidates()
    for sequence in walk:
        if sequence.seq_id != 77:
            queue.drop(sequence)
    assert len(queue._classes) == len(queue._priorities) == 1
    assert drain(queue) == [77]


def test_walk_survives_that_the_dead_are_thrown_out_meanwhile():
    queue = WaitingQueue(1000)
    aborted = [make_sequence(seq_id, priority=1 + seq_id % 2) for seq_id in range(160)]
    for sequence in (*aborted, *(make_sequence(seq_id) for seq_id in range(200, 300))):
        queue.try_add(sequence)
    for sequence in aborted:
        queue.drop(sequence)
    walk = queue.candidates()
    admitted = []
    for sequence in walk:
        admitted.append(sequence.seq_id)
        queue.drop(sequence)
    assert admitted == list(range(200, 300))
    assert (len(queue), queue._num_entries, queue._priorities) == (0, 0, [])


def test_tenants_take_turns_inside_a_class():
    queue = WaitingQueue(20)
    for seq_id in range(4):
        queue.try_add(make_sequence(seq_id, arrival=seq_id, tenant="busy"))
    queue.try_add(make_sequence(4, arrival=8.0, tenant="calm"))
    queue.try_add(make_sequence(5, arrival=9.0, tenant="calm"))
    queue.try_add(make_sequence(6, arrival=10.0, tenant="busy", priority=-1))
    assert drain(queue) == [6, 0, 4, 1, 5, 2, 3]


def test_who_was_given_less_is_next():
    accounts = Accounts()
    queue = WaitingQueue(20, accounts)
    for seq_id, tenant in enumerate(["a", "b", "a", "b", "a"]):
        queue.try_add(make_sequence(seq_id, arrival=seq_id, tenant=tenant))
    accounts.of("a").served = 100.0
    assert drain(queue) == [1, 3, 0, 2, 4]


def test_a_tenant_of_twice_the_weight_is_charged_half():
    accounts = Accounts({"heavy": 2.0})
    for tenant in ("heavy", "light"):
        accounts.charge(make_sequence(0, tenant=tenant), 10)
    assert (accounts.of("heavy").served, accounts.of("light").served) == (5.0, 10.0)


def test_tokens_are_charged_once_however_often_they_are_computed():
    accounts, sequence = Accounts(), make_sequence(0)
    for num_tokens in (4, 8, 2, 9):
        accounts.charge(sequence, num_tokens)
    assert accounts.of("").served == 9.0


def test_nobody_saves_up_turns_by_staying_away():
    accounts = Accounts()
    for _ in range(3):
        busy = make_sequence(0, tenant="busy")
        busy.token_ids = [5] * 100
        accounts.enter(busy), accounts.admit(busy)
    accounts.enter(make_sequence(1, tenant="back"))
    assert accounts.of("back").served == 200.0


def test_accounts_of_many_passing_tenants_do_not_pile_up():
    accounts = Accounts()
    for index in range(10_000):
        one = make_sequence(index, tenant=f"user-{index}")
        accounts.enter(one), accounts.admit(one), accounts.leave(one)
    assert len(accounts) < 3000


def test_budget_keeps_tokens_back_for_others():
    budget = StepBudget.from_config(make_config(max_num_batched_tokens=10), num_running=0)
    assert [budget.chunk_of(25), budget.chunk_of(25, kept_back=4), budget.chunk_of(3)] == [10, 6, 3]
    assert budget.chunk_of(5, kept_back=12) == 0


def test_budget_without_chunks_takes_all_or_nothing():
    budget = StepBudget.from_config(make_config(enable_chunked_prefill=False), num_running=0)
    assert [budget.chunk_of(16), budget.chunk_of(17)] == [16, 0]

"""Who is next: preempted first, then by priority, then by arrival."""

from __future__ import annotations

from engine.budget import StepBudget
from engine.messages import SamplingParams
from engine.sequence import Sequence
from engine.waiting import WaitingQueue
from tests.engine.builders import make_config


def make_sequence(seq_id: int, priority: int = 0, arrival: float = 0.0) -> Sequence:
    sampling = SamplingParams(9)
    sequence = Sequence(seq_id, f"r{seq_id}", b"api-0", [5], 1, 9, frozenset(), sampling)
    sequence.priority, sequence.arrival = priority, arrival
    return sequence


def drain(queue: WaitingQueue) -> list[int]:
    order = []
    while sequence := queue.first():
        order.append(sequence.seq_id)
        queue.drop(sequence)
    return order


def test_priority_goes_before_arrival_and_arrival_before_order():
    queue = WaitingQueue(9)
    for seq_id, priority, arrival in [(0, 1, 0.0), (1, 0, 5.0), (2, 0, 3.0), (3, 0, 3.0), (4, -1, 9.0)]:
        queue.try_add(make_sequence(seq_id, priority, arrival))
    assert drain(queue) == [4, 2, 3, 1, 0]


def test_looking_at_the_first_does_not_remove_it():
    queue = WaitingQueue(9)
    queue.try_add(make_sequence(0))
    assert queue.first() is queue.first() is not None
    assert len(queue) == 1


def test_preempted_sequences_come_first_the_last_put_back_at_the_front():
    queue = WaitingQueue(9)
    queue.try_add(make_sequence(0, priority=-9))
    queue.put_back(make_sequence(1))
    queue.put_back(make_sequence(2))
    assert drain(queue) == [2, 1, 0]


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
    assert len(queue) == 1 and len(queue._newcomers) < 200


def test_budget_keeps_tokens_back_for_others():
    budget = StepBudget.from_config(make_config(max_num_batched_tokens=10), num_running=0)
    assert [budget.chunk_of(25), budget.chunk_of(25, kept_back=4), budget.chunk_of(3)] == [10, 6, 3]
    assert budget.chunk_of(5, kept_back=12) == 0


def test_budget_without_chunks_takes_all_or_nothing():
    budget = StepBudget.from_config(make_config(enable_chunked_prefill=False), num_running=0)
    assert [budget.chunk_of(16), budget.chunk_of(17)] == [16, 0]

"""The load of bench_serving.py is the same for every run, and its figures say what they claim."""

from __future__ import annotations

import pytest

from tests.bench.bench_serving import fairness, summarize
from tests.bench.serving_client import Record
from tests.bench.serving_load import FLOOD, Shape, make_load


def make_record(tenant: str, sent: float, arrivals: list[float], tokens: int = 10) -> Record:
    record = Record("0", tenant, 0, sent, arrivals, ended=arrivals[-1])
    record.num_prompt_tokens, record.num_output_tokens = 0, tokens
    return record


def test_load_is_the_same_for_the_same_seed_and_with_a_flood():
    shape = Shape(num_conversations=8)
    load = make_load(shape, rate=2.0, seed=5)
    assert load == make_load(shape, rate=2.0, seed=5) != make_load(shape, rate=2.0, seed=6)
    flooded = make_load(Shape(num_conversations=8, flood=3), rate=2.0, seed=5)
    assert [one for one in flooded if one.tenant != FLOOD] == load
    assert len(flooded) == 11


def test_arrivals_have_the_asked_rate_and_lengths_the_asked_median():
    load = make_load(Shape(num_conversations=400), rate=4.0, seed=1)
    assert load[-1].begins == pytest.approx(100.0, rel=0.2)
    lengths = sorted(turn.num_tokens for one in load for turn in one.turns)
    assert lengths[len(lengths) // 2] == pytest.approx(48, rel=0.2)
    assert max(lengths) <= 6 * 48


def test_times_count_from_sending_and_leave_the_flood_out():
    calm = make_record("calm", 1.0, [1.5, 1.6, 1.8])
    summary = summarize([calm, make_record(FLOOD, 0.0, [9.0, 10.0])])
    assert summary["first_p99"] == pytest.approx(500)
    assert summary["gap_p50"] == pytest.approx(200)
    assert summary["output_tokens_per_second"] == pytest.approx(2.0)


def test_fairness_is_one_when_even_and_a_half_when_one_of_two_gets_everything():
    even = [make_record(tenant, 0.0, [1.0]) for tenant in "ab"]
    assert fairness(even) == pytest.approx(1.0)
    one_sided = [make_record("a", 0.0, [1.0]), make_record("b", 0.0, [1.0], tokens=0)]
    assert fairness(one_sided) == pytest.approx(0.5)

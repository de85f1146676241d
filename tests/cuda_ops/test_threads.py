"""The thread pool: many short rounds, several callers, and a changing number of threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cuda_ops
from tests.checks import assert_same_bits
from tests.cuda_ops.builders import make_weight, unwritten


@pytest.fixture(autouse=True)
def _one_thread_afterwards():
    yield
    cuda_ops.set_num_threads(1)


def multiply(x: np.ndarray, weight: cuda_ops.Weight) -> np.ndarray:
    out = unwritten((len(x), weight.out_features), "float32")
    cuda_ops.linear(x, weight, out)
    return out


def test_thousands_of_short_rounds_give_the_same_bits(rand):
    weight, _ = make_weight(rand, "int8", 96, 32)
    x = rand.normal(3, 32)
    expected = multiply(x, weight)
    cuda_ops.set_num_threads(4)
    for _ in range(3000):
        assert_same_bits(multiply(x, weight), expected)


def test_callers_on_several_python_threads_do_not_disturb_each_other(rand):
    weight, _ = make_weight(rand, "int4", 200, 64)
    inputs = [rand.normal(20, 64) for _ in range(4)]
    expected = [multiply(x, weight) for x in inputs]
    cuda_ops.set_num_threads(3)
    with ThreadPoolExecutor(4) as callers:
        for _ in range(50):
            for actual, wanted in zip(
                callers.map(lambda x: multiply(x, weight), inputs), expected, strict=True
            ):
                assert_same_bits(actual, wanted)


def test_the_number_of_threads_may_change_between_calls(rand):
    weight, _ = make_weight(rand, "bfloat16", 64, 48)
    x = rand.normal(7, 48)
    expected = multiply(x, weight)
    for num_threads in (2, 5, 1, 3, 3, 2):
        cuda_ops.set_num_threads(num_threads)
        assert_same_bits(multiply(x, weight), expected, f"{num_threads} threads")


@pytest.mark.parametrize("num_experts", [7, 64])
def test_routing_has_the_same_bits_for_any_number_of_tokens_and_threads(rand, num_experts):
    """Few tokens are cut by experts, many by tokens."""
    x, router = rand.normal(50, 80), rand.normal(2, num_experts, 80, scale=0.3)
    bias, token_types = rand.normal(2, num_experts, scale=0.05), np.tile([0, 1], 25).astype(np.int32)

    def route(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        count = len(x[rows])
        ids, weights = np.empty((count, 4), np.int32), unwritten((count, 4), "float32")
        cuda_ops.route_experts(x[rows], router, bias, token_types[rows], 4, 1e-12, ids, weights)
        return ids, weights

    expected_ids, expected_weights = route(slice(0, 50))
    for num_threads in (1, 2, 3, 9):
        cuda_ops.set_num_threads(num_threads)
        for rows in (slice(0, 1), slice(7, 9), slice(0, 50)):
            ids, weights = route(rows)
            assert_same_bits(ids, expected_ids[rows], f"ids of {rows}, {num_threads} threads")
            assert_same_bits(weights, expected_weights[rows], f"weights of {rows}, {num_threads} threads")

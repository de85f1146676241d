"""Routing and experts against NumPy, for any mixture of pools and weight formats."""

from __future__ import annotations

import numpy as np
import pytest

import cuda_ops
from tests.checks import assert_close, assert_same_bits
from tests.cuda_ops import references
from tests.cuda_ops.builders import (
    DTYPES,
    WEIGHT_KINDS,
    allowed,
    make_weight,
    read,
    tensor,
    unwritten,
    values_of,
)


def route(x, router, bias, token_types, top_k, dtype="float32"):
    ids = np.full((len(x), top_k), -7, np.int32)
    weights = unwritten((len(x), top_k), "float32")
    cuda_ops.route_experts(tensor(x, dtype), router, bias, token_types, top_k, 1e-12, ids, weights)
    return ids, weights


def make_pools(rand, num_experts, hidden, widths, kind, group=8):
    """Weights as the op takes them, and as the fp32 matrices they stand for."""
    pools, matrices = [], []
    for width in widths:
        up_gate, up_gate_matrix = make_weight(rand, kind, 2 * width, hidden, group, (num_experts,))
        down, down_matrix = make_weight(rand, kind, hidden, width, group, (num_experts,))
        pools.append((up_gate, down))
        matrices.append((up_gate_matrix, down_matrix))
    return pools, matrices


def make_shared(rand, hidden, width, kind, group=8):
    """The same of one expert that is no part of a stack."""
    up_gate, up_gate_matrix = make_weight(rand, kind, 2 * width, hidden, group)
    down, down_matrix = make_weight(rand, kind, hidden, width, group)
    return (up_gate, down), (up_gate_matrix, down_matrix)


def spans_of(expert, dtype):
    """Of the int8 form of x and of the middle activation; 0 where they stay as they are."""
    return [
        references.int8_span(weight.kind, weight.group) if dtype == "bfloat16" else 0 for weight in expert
    ]


def run_experts(x, ids, weights, pools, dtype="float32", shared=None):
    out = unwritten(x.shape, dtype)
    cuda_ops.moe_experts(tensor(x, dtype), ids, weights, pools, out, shared)
    return read(out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_route_experts_matches_numpy_with_bias_pools_and_inert_rows(rand, dtype):
    m, num_experts, hidden = 61, 64, 80
    x, router = rand.normal(m, hidden), rand.normal(2, num_experts, hidden, scale=0.3)
    bias = rand.normal(2, num_experts, scale=0.05)
    token_types = rand.numpy.integers(-1, 2, m).astype(np.int32)
    ids, weights = route(x, router, bias, token_types, 6, dtype)
    expected_ids, expected = references.route_experts(
        values_of(x, dtype), router, bias, token_types, 6, 1e-12
    )
    assert_same_bits(ids, expected_ids, "ids")
    assert_close(weights, expected, 1e-5, "weights")
    assert_close(weights[token_types >= 0].sum(-1), np.ones((token_types >= 0).sum()), 1e-6, "sums")


def test_equal_scores_go_to_the_lowest_expert():
    ids, weights = route(np.zeros((3, 8)), np.ones((1, 5, 8), np.float32), np.zeros((1, 5), np.float32),
                         np.zeros(3, np.int32), 3)  # fmt: skip
    assert ids.tolist() == [[0, 1, 2]] * 3
    assert_close(weights, np.full((3, 3), 1 / 3), 1e-6)


def test_bias_selects_but_does_not_weigh():
    bias = np.array([[0.0, 0.0, 5.0, 0.0]], np.float32)
    ids, weights = route(np.zeros((1, 8)), np.ones((1, 4, 8), np.float32), bias, np.zeros(1, np.int32), 2)
    assert ids.tolist() == [[2, 0]]
    assert_close(weights, np.full((1, 2), 0.5), 1e-6)


def test_a_token_type_without_a_pool_is_refused():
    with pytest.raises(ValueError, match="route_experts: token_types must lie in"):
        route(np.zeros((1, 8)), np.ones((1, 4, 8), np.float32), np.zeros((1, 4), np.float32),
              np.array([1], np.int32), 2)  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "hidden,widths,group", [(48, (40, 16), 8), (96, (160, 64), 32), (128, (64, 192), 64)]
)
def test_moe_experts_matches_numpy_for_two_pools_of_different_width(rand, kind, dtype, hidden, widths, group):
    m, num_experts, top_k = 23, 5, 3
    pools, matrices = make_pools(rand, num_experts, hidden, widths, kind, group)
    x = rand.normal(m, hidden) * 0.3
    token_types = rand.numpy.integers(-1, 2, m).astype(np.int32)
    chosen = np.argsort(rand.normal(m, num_experts))[:, :top_k]
    ids = np.where(token_types[:, None] < 0, -1, token_types[:, None] * num_experts + chosen).astype(np.int32)
    weights = rand.numpy.uniform(0.1, 1.0, (m, top_k)).astype(np.float32)
    out = run_experts(x, ids, weights, pools, dtype)
    spans = None
    if dtype == "bfloat16":
        spans = [tuple(references.int8_span(kind, weight.group) for weight in pool) for pool in pools]
    expected = references.moe_experts(values_of(x, dtype), ids, weights, matrices, spans)
    assert_close(out, expected, 4 * allowed(dtype, expected, hidden), f"{kind} {dtype}")
    assert (out[token_types < 0] == 0).all()


@pytest.mark.parametrize("kind,shared_kind", [("int4", "int8"), ("int8", "bfloat16"), ("float32", "float32")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 7, 70])
def test_every_token_has_the_shared_expert_too_even_an_inert_one(rand, kind, shared_kind, dtype, m):
    num_experts, hidden, width = 4, 128, 64
    pools, matrices = make_pools(rand, num_experts, hidden, (width,), kind, 64)
    shared, shared_matrices = make_shared(rand, hidden, 3 * width, shared_kind, 64)
    x = rand.normal(m, hidden) * 0.3
    ids = np.argsort(rand.normal(m, num_experts))[:, :2].astype(np.int32)
    ids[-1] = -1
    weights = rand.numpy.uniform(0.1, 1.0, (m, 2)).astype(np.float32)
    out = run_experts(x, ids, weights, pools, dtype, shared)
    values = values_of(x, dtype)
    expected = references.moe_experts(values, ids, weights, matrices, [spans_of(pools[0], dtype)])
    expected += references.moe_experts(
        values, np.zeros((m, 1), np.int32), np.ones((m, 1)), [tuple(part[None] for part in shared_matrices)],
        [spans_of(shared, dtype)],
    )  # fmt: skip
    assert_close(out, expected, 4 * allowed(dtype, expected, hidden), f"{kind} and {shared_kind}, {dtype}")


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden,widths,group", [(32, (24, 8), 8), (128, (160, 96), 32)])
def test_a_token_has_the_same_bits_alone_and_among_many(rand, kind, dtype, hidden, widths, group):
    m, num_experts = 40, 3
    pools, _ = make_pools(rand, num_experts, hidden, widths, kind, group)
    shared, _ = make_shared(rand, hidden, 2 * widths[0], "int8")
    x = rand.normal(m, hidden)
    ids = np.argsort(rand.normal(m, 2 * num_experts))[:, :2].astype(np.int32)
    weights = rand.numpy.uniform(0.1, 1.0, (m, 2)).astype(np.float32)
    cuda_ops.set_num_threads(3)
    try:
        together = run_experts(x, ids, weights, pools, dtype, shared)
    finally:
        cuda_ops.set_num_threads(1)
    for i in (0, 1, 17, 39):
        alone = run_experts(x[i : i + 1], ids[i : i + 1], weights[i : i + 1], pools, dtype, shared)
        assert_same_bits(alone[0], together[i], f"token {i}")


def test_pools_of_different_formats_share_one_call(rand):
    """Each pool sees x in its own form: int8 in two span widths, bf16, and int8 by rows."""
    m, hidden, width = 9, 192, 64
    formats = (("int4", 64), ("int4", 32), ("bfloat16", 0), ("int8", 0), ("int4", 64))
    parts = [make_pools(rand, 2, hidden, (width,), kind, group) for kind, group in formats]
    pools, matrices = ([part[i][0] for part in parts] for i in (0, 1))
    ids = np.array([[2 * (i % 5), 2 * ((i + 2) % 5) + 1] for i in range(m)], np.int32)
    weights = np.full((m, 2), 0.5, np.float32)
    x = rand.normal(m, hidden) * 0.2
    spans = [tuple(references.int8_span(w.kind, w.group) for w in pool) for pool in pools]
    expected = references.moe_experts(values_of(x, "bfloat16"), ids, weights, matrices, spans)
    out = run_experts(x, ids, weights, pools, "bfloat16")
    assert_close(out, expected, 4 * allowed("bfloat16", expected), "five formats")


def test_all_tokens_may_choose_one_expert(rand):
    pools, matrices = make_pools(rand, 4, 16, (8,), "float32")
    x = rand.normal(250, 16)
    ids, weights = np.full((250, 1), 2, np.int32), np.ones((250, 1), np.float32)
    expected = references.moe_experts(x, ids, weights, matrices)
    assert_close(run_experts(x, ids, weights, pools), expected, 1e-4)


def test_no_tokens_is_fine(rand):
    pools, _ = make_pools(rand, 2, 16, (8, 8), "int4")
    out = run_experts(np.zeros((0, 16)), np.zeros((0, 2), np.int32), np.zeros((0, 2), np.float32), pools)
    assert out.shape == (0, 16)


def test_an_expert_that_does_not_exist_is_refused(rand):
    pools, _ = make_pools(rand, 2, 16, (8, 8), "float32")
    with pytest.raises(ValueError, match="moe_experts: expert_ids must be -1 or name an expert"):
        run_experts(np.zeros((1, 16)), np.array([[4]], np.int32), np.ones((1, 1), np.float32), pools)


def test_a_pool_of_the_wrong_shape_is_named(rand):
    pools, _ = make_pools(rand, 2, 16, (8, 8), "float32")
    wrong = [pools[0], (pools[1][0], make_weight(rand, "float32", 15, 8, stack=(2,))[0])]
    with pytest.raises(ValueError, match=r"moe_experts: pools\[1\].down.data must be \[E=2, H=16, width\]"):
        run_experts(np.zeros((1, 16)), np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32), wrong)

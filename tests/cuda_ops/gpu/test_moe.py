"""Routing and experts of both pools: the CUDA bodies against NumPy, and a token's bits in any batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from cuda_ops.emulator import emulator
from tests.checks import assert_close, assert_same_bits
from tests.conftest import Rand

from .builders import BFLOAT16, NAN_BF16, decode, empty, from_bf16, reported, to_bf16
from .structures import PackedExperts, Weight, aligned, pack

TEXT, VISION, INERT = 0, 1, -1


@dataclass
class Experts:
    """Both pools of one layer."""

    pools: list[tuple[Weight, Weight]]  # up_gate [E, 2 width, H], down [E, H, width]
    num_experts: int  # per pool

    @property
    def hidden(self) -> int:
        return self.pools[0][1].packed.out_features

    def run(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        m, top_k = ids.shape
        widths = [down.packed.in_features for _, down in self.pools]
        num_experts = self.num_experts * len(self.pools)
        size = emulator().number("moe_workspace_bytes", m, self.hidden, top_k, max(widths), num_experts)
        workspace, out = aligned(size, np.uint8), empty((m, self.hidden), BFLOAT16)
        packed = (PackedExperts * len(self.pools))(
            *(PackedExperts(up.packed, down.packed) for up, down in self.pools)
        )
        arrays = [array for pool in self.pools for weight in pool for array in weight.arrays]
        emulator().call(
            "moe_experts", None, x, ids, weights, (packed, [np.frombuffer(packed, np.uint8), *arrays]),
            len(self.pools), self.num_experts, out, m, self.hidden, top_k, workspace,
        )  # fmt: skip
        return out

    def expected(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        out = np.zeros((len(x), self.hidden))
        for i, j in np.argwhere(ids >= 0):
            up_gate, down = self.pools[ids[i, j] // self.num_experts]
            expert = ids[i, j] % self.num_experts
            gate, up = np.split(up_gate.values[expert].astype(np.float64) @ x[i], 2)
            hidden = from_bf16(to_bf16((gate / (1 + np.exp(-gate)) * up).astype(np.float32)))
            out[i] += weights[i, j] * (down.values[expert].astype(np.float64) @ hidden)
        return out


def make_experts(rand: Rand, kind: str, widths: tuple[int, ...] = (64, 32), hidden: int = 64, group: int = 32,
                 num_experts: int = 4) -> Experts:  # fmt: skip
    return Experts(
        [
            (
                pack(rand.normal(num_experts, 2 * width, hidden, scale=0.2), kind, group, is_gated=True),
                pack(rand.normal(num_experts, hidden, width, scale=0.2), kind, group),
            )
            for width in widths
        ],
        num_experts,
    )


def make_routing(
    rand: Rand, m: int, top_k: int = 2, num_experts: int = 4, pools: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Each token uses `top_k` different experts of one random pool."""
    ids = np.array([rand.numpy.permutation(num_experts)[:top_k] for _ in range(m)]).reshape(m, top_k)
    ids = ids + rand.numpy.integers(0, pools, (m, 1)) * num_experts
    return ids.astype(np.int32), rand.numpy.random((m, top_k)).astype(np.float32)


KINDS = pytest.mark.parametrize("kind", ["int4", "int8", "bfloat16"])


@KINDS
@pytest.mark.parametrize("m", [1, 11, 40])
def test_each_token_gets_the_weighted_sum_of_its_experts(rand: Rand, kind: str, m: int) -> None:
    experts, x = make_experts(rand, kind), to_bf16(rand.normal(m, 64))
    ids, weights = make_routing(rand, m)
    expected = experts.expected(from_bf16(x), ids, weights)
    assert_close(decode(experts.run(x, ids, weights)), expected, np.abs(expected).max() * 2**-7)


@KINDS
def test_a_tokens_bits_do_not_depend_on_its_batch(rand: Rand, kind: str) -> None:
    experts, x = make_experts(rand, kind, hidden=576), to_bf16(rand.normal(35, 576))
    ids, weights = make_routing(rand, 35)
    together = experts.run(x, ids, weights)
    for row in (0, 17, 34):
        one = slice(row, row + 1)
        assert_same_bits(experts.run(x[one].copy(), ids[one].copy(), weights[one].copy())[0], together[row])


def test_all_tokens_may_choose_the_same_expert(rand: Rand) -> None:
    experts, m = make_experts(rand, "int4"), 50
    x, ids = to_bf16(rand.normal(m, 64)), np.tile(np.array([6, 5], np.int32), (m, 1))
    weights = np.full((m, 2), 0.5, np.float32)
    expected = experts.expected(from_bf16(x), ids, weights)
    assert_close(decode(experts.run(x, ids, weights)), expected, np.abs(expected).max() * 2**-7)


def test_inert_tokens_are_zeros_and_their_input_is_never_used(rand: Rand) -> None:
    experts, x = make_experts(rand, "int8"), to_bf16(rand.normal(6, 64))
    ids, weights = make_routing(rand, 6)
    ids[[1, 4]] = -1
    x[[1, 4]] = NAN_BF16
    weights[[1, 4]] = np.nan
    out = decode(experts.run(x, ids, weights))
    assert (out[[1, 4]] == 0).all()
    live = [0, 2, 3, 5]
    expected = experts.expected(from_bf16(x)[live], ids[live], weights[live])
    assert_close(out[live], expected, np.abs(expected).max() * 2**-7)


def test_a_batch_of_inert_tokens_or_of_none_is_served(rand: Rand) -> None:
    experts = make_experts(rand, "int4")
    ids, weights = np.full((3, 2), -1, np.int32), np.zeros((3, 2), np.float32)
    assert (decode(experts.run(np.full((3, 64), NAN_BF16), ids, weights)) == 0).all()
    assert experts.run(np.zeros((0, 64), np.uint16), ids[:0], weights[:0]).shape == (0, 64)


def test_more_pairs_than_one_dispatch_block_holds_keep_their_order(rand: Rand) -> None:
    m, top_k, num_experts = 300, 4, 8  # 1200 pairs: two blocks
    experts = make_experts(rand, "bfloat16", widths=(8, 8), hidden=16, num_experts=num_experts)
    x = to_bf16(rand.normal(m, 16))
    ids, weights = make_routing(rand, m, top_k, num_experts)
    expected = experts.expected(from_bf16(x), ids, weights)
    assert_close(decode(experts.run(x, ids, weights)), expected, np.abs(expected).max() * 2**-7)


def test_one_pool_is_enough(rand: Rand) -> None:
    experts, x = make_experts(rand, "int8", widths=(32,)), to_bf16(rand.normal(3, 64))
    ids, weights = make_routing(rand, 3, pools=1)
    expected = experts.expected(from_bf16(x), ids, weights)
    assert_close(decode(experts.run(x, ids, weights)), expected, np.abs(expected).max() * 2**-7)


def test_a_weight_that_is_not_packed_gated_is_refused(rand: Rand) -> None:
    experts = make_experts(rand, "int8")
    experts.pools[0][0].packed.is_gated = False
    ids, weights = make_routing(rand, 1)
    with reported("up_gate must be packed gated, down plain"):
        experts.run(to_bf16(rand.normal(1, 64)), ids, weights)


def route(
    x: np.ndarray, router: np.ndarray, bias: np.ndarray, types: np.ndarray, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    pools, num_experts, h = router.shape
    m = len(x)
    parts = emulator().number("router_parts", h)
    split = router.reshape(pools * num_experts, parts, h // parts).transpose(1, 0, 2)
    packed = pack(np.ascontiguousarray(split), "float32")
    ids, weights = np.full((m, top_k), -7, np.int32), np.full((m, top_k), np.nan, np.float32)
    logits = np.full((parts, m, pools * num_experts), np.nan, np.float32)
    emulator().call(
        "route_experts", None, x, packed.argument, bias, types, 1e-12, ids, weights,
        m, h, pools, num_experts, top_k, logits,
    )  # fmt: skip
    return ids, weights


def probabilities(x: np.ndarray, router: np.ndarray, types: np.ndarray) -> np.ndarray:
    logits = np.einsum("mh,meh->me", x.astype(np.float64), router[types].astype(np.float64))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("num_experts", "top_k", "h"), [(8, 2, 72), (64, 8, 704), (40, 6, 512)])
def test_a_token_is_routed_inside_its_pool_by_biased_probability(
    rand: Rand, num_experts: int, top_k: int, h: int
) -> None:
    m = 6
    x, router = to_bf16(rand.normal(m, h)), rand.normal(2, num_experts, h, scale=2.5 / np.sqrt(h))
    bias = rand.normal(2, num_experts, scale=0.1)
    types = np.array([TEXT, VISION, VISION, TEXT, TEXT, VISION], np.int32)
    ids, weights = route(x, router, bias, types, top_k)
    p = probabilities(from_bf16(x), router, types)
    chosen = np.argsort(-(p + bias[types]), axis=1, kind="stable")[:, :top_k]
    local = ids - types[:, None] * num_experts
    assert ((local >= 0) & (local < num_experts)).all() and all(len(set(row)) == top_k for row in local)
    scores = p + bias[types]  # near ties may fall either way in fp32, so scores are compared and not ids
    best = np.take_along_axis(scores, chosen, axis=1)
    assert_close(np.take_along_axis(scores, local, axis=1), best, 1e-6)
    picked = np.take_along_axis(p, local, axis=1)
    assert_close(weights, picked / picked.sum(axis=1, keepdims=True), 1e-5)


def test_equal_scores_go_to_the_lowest_index(rand: Rand) -> None:
    x, router = to_bf16(rand.normal(2, 16)), np.zeros((2, 64, 16), np.float32)
    bias = np.zeros((2, 64), np.float32)
    bias[1, [9, 40]] = 0.5
    ids, weights = route(x, router, bias, np.array([TEXT, VISION], np.int32), 4)
    assert ids.tolist() == [[0, 1, 2, 3], [73, 104, 64, 65]]
    assert_close(weights, np.full((2, 4), 0.25), 1e-6)


def test_an_inert_token_has_no_expert(rand: Rand) -> None:
    x, router = to_bf16(rand.normal(3, 16)), rand.normal(2, 8, 16)
    x[1] = NAN_BF16
    ids, weights = route(
        x, router, np.zeros((2, 8), np.float32), np.array([TEXT, INERT, VISION], np.int32), 2
    )
    assert ids[1].tolist() == [-1, -1] and weights[1].tolist() == [0, 0]
    assert (ids[[0, 2]] >= 0).all() and np.isfinite(weights[[0, 2]]).all()


def test_nan_scores_still_give_legal_experts() -> None:
    x, router = np.full((1, 16), NAN_BF16), np.ones((1, 8, 16), np.float32)
    ids, _ = route(x, router, np.zeros((1, 8), np.float32), np.array([TEXT], np.int32), 2)
    assert ((ids >= 0) & (ids < 8)).all()


def test_routing_has_the_same_bits_in_any_batch(rand: Rand) -> None:
    x, router = to_bf16(rand.normal(20, 640)), rand.normal(2, 64, 640, scale=0.1)
    bias, types = rand.normal(2, 64, scale=0.01), rand.numpy.integers(0, 2, 20).astype(np.int32)
    ids, weights = route(x, router, bias, types, 8)
    for row in (0, 19):
        one = slice(row, row + 1)
        ids_alone, weights_alone = route(x[one].copy(), router, bias, types[one].copy(), 8)
        assert_same_bits(ids_alone[0], ids[row])
        assert_same_bits(weights_alone[0], weights[row])

"""Packed products on the tensor cores: every weight kind against NumPy, and a row's bits in any batch."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_ops.emulator import emulator
from tests.checks import assert_close, assert_same_bits
from tests.conftest import Rand

from .builders import BFLOAT16, FLOAT32, decode, empty, from_bf16, reported, to_bf16
from .structures import Weight, pack

NONE, GELU, QUICK_GELU = range(3)  # octet::Activation
ALL_KINDS = pytest.mark.parametrize(
    ("kind", "group"), [("int4", 64), ("int4", 32), ("int8", 0), ("bfloat16", 0), ("float32", 0)]
)


def linear(x: np.ndarray, weight: Weight, dtype: int = FLOAT32, bias: np.ndarray | None = None,
           activation: int = NONE, width: int | None = None) -> np.ndarray:  # fmt: skip
    m = len(x)
    out = empty((m, width or weight.packed.out_features), dtype)
    emulator().call("linear", None, x, weight.argument, bias, activation, dtype, out, m)
    return out


def allowed(x: np.ndarray, values: np.ndarray) -> float:
    """Room for fp32 sums of K terms in any order."""
    return float(2e-7 * np.sqrt(x.shape[-1]) * np.abs(x).max(initial=1) * np.abs(values).sum(axis=-1).max())


@ALL_KINDS
@pytest.mark.parametrize("m", [1, 9, 37])
def test_a_product_is_that_of_the_dequantised_weights(rand: Rand, kind: str, group: int, m: int) -> None:
    n, k = 40, 192 if kind == "int4" else 200  # neither fills its last tile of 16 rows, nor 200 its columns
    weight, x = pack(rand.normal(1, n, k), kind, group), to_bf16(rand.normal(m, k))
    expected = from_bf16(x).astype(np.float64) @ weight.values[0].T
    assert_close(linear(x, weight), expected, allowed(from_bf16(x), weight.values[0]))


@ALL_KINDS
def test_rows_have_the_same_bits_alone_and_in_any_batch(rand: Rand, kind: str, group: int) -> None:
    k = 1152  # eighteen column tiles: some warps have three, some two
    weight, x = pack(rand.normal(1, 16, k), kind, group), to_bf16(rand.normal(33, k))
    together = linear(x, weight)  # 33 rows, 12 and 1 take three different tile shapes
    assert_same_bits(linear(x[:12].copy(), weight), together[:12].copy())
    for row in (0, 7, 32):
        assert_same_bits(linear(x[row : row + 1].copy(), weight)[0], together[row])


def test_tiles_for_long_and_short_rows_give_the_same_sums(rand: Rand) -> None:
    k = 2048  # the shape changes here, as it does with the number of rows
    weight, x = pack(rand.normal(1, 64, k), "int4"), to_bf16(rand.normal(9, k))
    assert_same_bits(linear(x[:1].copy(), weight)[0], linear(x, weight)[0])


def test_an_empty_batch_is_no_launch() -> None:
    weight = pack(np.ones((1, 16, 64), np.float32), "int8")
    assert linear(np.zeros((0, 64), np.uint16), weight).shape == (0, 16)


@pytest.mark.parametrize("activation", [NONE, GELU, QUICK_GELU])
def test_bias_and_activation_come_before_the_one_rounding(rand: Rand, activation: int) -> None:
    weight, x = pack(rand.normal(1, 24, 64), "bfloat16"), to_bf16(rand.normal(3, 64, scale=0.2))
    bias = to_bf16(rand.normal(24))
    y = from_bf16(x).astype(np.float64) @ weight.values[0].T + from_bf16(bias)
    if activation == GELU:
        erf = np.vectorize(__import__("math").erf)
        y = 0.5 * y * (1 + erf(y / np.sqrt(2)))
    elif activation == QUICK_GELU:
        y = y / (1 + np.exp(-1.702 * y))
    assert_close(decode(linear(x, weight, BFLOAT16, bias, activation)), y, np.abs(y).max() * 2**-8)


@pytest.mark.parametrize(("kind", "group"), [("int4", 32), ("int8", 0), ("bfloat16", 0)])
def test_a_gated_weight_multiplies_silu_of_its_first_half_with_the_second(
    rand: Rand, kind: str, group: int
) -> None:
    width, k, m = 24, 96, 5
    weight = pack(rand.normal(1, 2 * width, k), kind, group, is_gated=True)
    x = to_bf16(rand.normal(m, k, scale=0.3))
    gate, up = np.split(from_bf16(x).astype(np.float64) @ weight.values[0].T, 2, axis=1)
    expected = gate / (1 + np.exp(-gate)) * up
    out = linear(x, weight, BFLOAT16, width=width)
    assert_close(decode(out), expected, np.abs(expected).max() * 2**-8)


def test_fp32_weights_keep_their_last_bits(rand: Rand) -> None:
    k = 64
    values = (1 + rand.numpy.integers(0, 2**20, (1, 16, k)) * 2.0**-23).astype(np.float32)
    x = np.zeros((1, k), np.float32)
    x[0, 5] = 1.5  # one term: the product must be exact
    weight = pack(values, "float32")
    assert_close(linear(to_bf16(x), weight), 1.5 * values[0, :, 5][None], 2.0**-22)


def test_a_width_that_is_no_multiple_of_eight_is_refused() -> None:
    with reported("in_features must be a multiple of 8"):
        pack(np.ones((1, 16, 60), np.float32), "int8")

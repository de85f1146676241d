"""Quantised and packed on the device: the rule to the bit, and what an activation does in place."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cuda_ops.emulator import emulator
from tests.checks import assert_close, assert_same_bits
from tests.conftest import Rand

from .builders import BFLOAT16, FLOAT32, decode, encode, reported, tolerance
from .structures import quantized

DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])


@DTYPES
@pytest.mark.parametrize(("n", "k"), [(0, 8), (1, 7), (5, 300)])
def test_int8_follows_the_rule_to_the_bit(rand: Rand, dtype: int, n: int, k: int) -> None:
    weight = encode(rand.normal(n, k), dtype)
    if n > 1:
        weight[1] = 0  # a row of zeros has scale 1
    data, scales = np.full((n, k), 99, np.int8), np.zeros(n, np.uint16)
    emulator().call("quantize_int8", None, dtype, weight, data, scales, n, k)
    expected, expected_scales, _ = quantized(decode(weight)[None], "int8", 0)
    assert_same_bits(data, expected[0])
    assert_same_bits(scales, expected_scales[0, :, 0])
    assert n < 2 or decode(scales)[1] == 1


@DTYPES
@pytest.mark.parametrize("group", [2, 32, 64, 96])
def test_int4_follows_the_rule_to_the_bit(rand: Rand, dtype: int, group: int) -> None:
    n, k = 3, 192
    weight = encode(rand.normal(n, k), dtype)
    data, scales = np.zeros((n, k // 2), np.uint8), np.zeros((n, k // group), np.uint16)
    emulator().call("quantize_int4", None, dtype, weight, group, data, scales, n, k)
    expected, expected_scales, _ = quantized(decode(weight)[None], "int4", group)
    assert_same_bits(data, expected[0])
    assert_same_bits(scales, expected_scales[0])


def test_a_group_that_does_not_divide_the_row_is_refused() -> None:
    row = np.zeros(100, np.float32)
    with reported("group must be even and divide the columns"):
        emulator().call(
            "quantize_int4", None, FLOAT32, row, 64, np.zeros(50, np.uint8), np.zeros(2, np.uint16), 1, 100
        )


@DTYPES
@pytest.mark.parametrize("activation", range(3), ids=["none", "gelu", "quick_gelu"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_bias_and_activation_work_in_place(rand: Rand, dtype: int, activation: int, has_bias: bool) -> None:
    m, n = 3, 40
    x, bias = encode(rand.normal(m, n, scale=2), dtype), encode(rand.normal(n), dtype)
    y = decode(x).astype(np.float64) + (decode(bias) if has_bias else 0)
    emulator().call("bias_activation", None, dtype, x, bias if has_bias else None, activation, m, n)
    erf = np.vectorize(math.erf)
    expected = [y, 0.5 * y * (1 + erf(y / np.sqrt(2))), y / (1 + np.exp(-1.702 * y))][activation]
    assert_close(decode(x), expected, tolerance(dtype, expected))

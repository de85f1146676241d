"""linear and cast against NumPy, and the promise that a row's bits ignore its batch."""

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
    bf16,
    make_weight,
    read,
    rounded,
    tensor,
    unwritten,
    values_of,
)

# m, n, k, int4 group: whole and cut tiles of rows, of columns, of spans; a group of 8 is too narrow for int8
SHAPES = (
    (0, 5, 32, 16),
    (1, 1, 2, 2),
    (3, 7, 64, 64),
    (13, 66, 160, 32),
    (40, 33, 256, 128),
    (200, 9, 72, 8),
)


def expected_linear(x, x_type, weight, matrix, bias=None, activation="none"):
    """The product as the CPU defines it: bf16 x meets quantised weights as int8."""
    values = values_of(x, x_type)
    if x_type == "bfloat16":
        values, _ = references.int8_activations(values, references.int8_span(weight.kind, weight.group))
    return references.linear(values, matrix, bias, activation)


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize("x_type", DTYPES)
@pytest.mark.parametrize("out_type", DTYPES)
def test_linear_matches_numpy_for_every_mixture_of_types(rand, x_type, kind, out_type):
    for m, n, k, group in SHAPES:
        weight, matrix = make_weight(rand, kind, n, k, group)
        x = rand.normal(m, k)
        out = unwritten((m, n), out_type)
        cuda_ops.linear(tensor(x, x_type), weight, out)
        expected = expected_linear(x, x_type, weight, matrix)
        terms = expected_linear(np.abs(x), x_type, weight, np.abs(matrix))  # they may cancel
        tolerance = max(allowed(out_type, expected, k), allowed("float32", terms, k))
        assert_close(read(out), expected, tolerance, f"linear {m}x{k}x{n}")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_int8_activations_stay_within_half_a_step_of_the_dequantised_product(rand, kind):
    for m, n, k, group in SHAPES[2:]:
        weight, matrix = make_weight(rand, kind, n, k, group)
        x = values_of(rand.normal(m, k), "bfloat16")
        out = unwritten((m, n), "float32")
        cuda_ops.linear(tensor(x, "bfloat16"), weight, out)
        exact = references.linear(x, matrix, None, "none")
        _, error = references.int8_activations(x, references.int8_span(kind, group))
        bound = error @ np.abs(matrix.astype(np.float64)).T + allowed("float32", exact, k)
        assert_close((out - exact) / bound, np.zeros((m, n)), 1.0, f"{kind} {m}x{k}x{n}, in bounds")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_spans_of_zeros_and_of_one_large_value_are_exact(rand, kind):
    weight, matrix = make_weight(rand, kind, 20, 192, 64)
    x = np.zeros((2, 192), np.float32)
    x[1, 70] = 3.0e30
    out = unwritten((2, 20), "float32")
    cuda_ops.linear(tensor(x, "bfloat16"), weight, out)
    assert (out[0] == 0).all()
    expected = values_of(x, "bfloat16")[1, 70].astype(np.float64) * matrix[:, 70]
    assert_close(out[1] / 3.0e30, expected / 3.0e30, 1e-5, kind)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("m", [1, 3, 40])
def test_the_largest_weights_and_activations_overflow_no_partial_sum(kind, m):
    n, k = 32, 192
    low, high, per_byte = (-127, 127, 1) if kind == "int8" else (-8, 7, 2)
    q = np.where(np.arange(n)[:, None] % 2, np.int8(low), np.int8(high)) * np.ones((1, k), np.int8)
    data = q if kind == "int8" else ((q[:, 0::2] & 15) | (q[:, 1::2] & 15) << 4).astype(np.uint8)
    scales = bf16(np.ones(n if kind == "int8" else (n, k // 64), np.float32))
    weight = cuda_ops.Weight(kind, data.reshape(n, k // per_byte), scales, 0 if kind == "int8" else 64)
    x = np.where(np.arange(m)[:, None] % 2, np.float32(-1), np.float32(1)) * np.ones((1, k), np.float32)
    out = unwritten((m, n), "float32")
    cuda_ops.linear(tensor(x, "bfloat16"), weight, out)
    expected = x.astype(np.float64) @ q.astype(np.float64).T
    assert_close(out / expected, np.ones((m, n)), 1e-6, f"{kind}, {m} rows of only the largest numbers")


def test_linear_takes_odd_widths_of_unquantised_weights(rand):
    for kind in ("float32", "bfloat16", "int8"):
        for x_type in DTYPES:
            weight, matrix = make_weight(rand, kind, 5, 37)
            x = rand.normal(9, 37)
            out = unwritten((9, 5), "float32")
            cuda_ops.linear(tensor(x, x_type), weight, out)
            expected = expected_linear(x, x_type, weight, matrix)
            assert_close(out, expected, allowed("float32", expected, 37), f"{kind} {x_type}")


@pytest.mark.parametrize("activation", ["none", "gelu", "quick_gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_adds_bias_before_the_activation(rand, activation, dtype):
    weight, matrix = make_weight(rand, dtype, 35, 64)
    x, bias = rand.normal(4, 64) * 0.3, rand.normal(35)
    out = unwritten((4, 35), dtype)
    cuda_ops.linear(tensor(x, dtype), weight, out, tensor(bias, dtype), activation)
    expected = references.linear(values_of(x, dtype), matrix, values_of(bias, dtype), activation)
    assert_close(read(out), expected, allowed(dtype, expected, 64), activation)


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(rand, kind, dtype):
    for k, group in ((192, 64), (96, 32), (40, 8)):
        weight, _ = make_weight(rand, kind, 70, k, group)
        x = rand.normal(205, k)
        whole = unwritten((205, 70), "float32")
        cuda_ops.set_num_threads(3)
        try:
            cuda_ops.linear(tensor(x, dtype), weight, whole)
        finally:
            cuda_ops.set_num_threads(1)
        for start, count in ((0, 1), (16, 1), (3, 2), (9, 3), (4, 4), (5, 7), (7, 17), (190, 15)):
            part = unwritten((count, 70), "float32")
            cuda_ops.linear(tensor(x[start : start + count], dtype), weight, part)
            assert_same_bits(part, whole[start : start + count], f"rows {start}..{start + count} of {kind}")


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("m", [1, 40])
def test_a_quantised_weight_gives_fp32_rows_the_bits_of_its_dequantised_matrix(rand, kind, m):
    weight, matrix = make_weight(rand, kind, 33, 128, 32)
    x = rand.normal(m, 128)
    quantised, plain = unwritten((m, 33), "float32"), unwritten((m, 33), "float32")
    cuda_ops.linear(x, weight, quantised)
    cuda_ops.linear(x, cuda_ops.Weight("float32", matrix), plain)
    assert_same_bits(quantised, plain, kind)


def test_cast_rounds_to_nearest_even_and_keeps_nan():
    halves = np.array([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-8, 3.4e38, np.inf, 1e-40], np.float32)
    out = unwritten((7,), "bfloat16")
    cuda_ops.cast(halves, out)
    assert_same_bits(read(out), rounded(halves), "ties")
    assert read(out)[1] == 1.0 and read(out)[2] == np.float32(1.0 + 4 * 2**-8)
    assert np.isnan(read(_cast_to_bf16(np.array([np.nan] * 17, np.float32)))).all()


def test_cast_round_trips_bf16_values_of_any_shape(rand):
    values = rounded(rand.normal(3, 5, 7))
    back = unwritten((3, 5, 7), "float32")
    cuda_ops.cast(_cast_to_bf16(values), back)
    assert_same_bits(back, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rounds_each_sum_once(rand, dtype):
    x, y = rand.normal(7, 2560), rand.normal(7, 2560)
    total = tensor(x, dtype)
    cuda_ops.add(total, tensor(y, dtype))
    assert_same_bits(read(total), values_of(values_of(x, dtype) + values_of(y, dtype), dtype))


def _cast_to_bf16(values):
    out = unwritten(values.shape, "bfloat16")
    cuda_ops.cast(values, out)
    return out

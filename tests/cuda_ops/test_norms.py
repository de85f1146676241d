"""rms_norm, add_rms_norm, layer_norm and silu_mul against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

import cuda_ops
from tests.checks import assert_close, assert_same_bits
from tests.cuda_ops import references
from tests.cuda_ops.builders import DTYPES, allowed, read, tensor, unwritten, values_of

SHAPES = [(0, 8), (1, 1), (2, 16), (5, 33), (17, 256), (3, 1280)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_matches_numpy(rand, shape, dtype):
    x, weight = rand.normal(*shape, scale=3.0), 1.0 + rand.normal(shape[1], scale=0.1)
    out = unwritten(shape, dtype)
    cuda_ops.rms_norm(tensor(x, dtype), tensor(weight, dtype), 1e-5, out)
    expected = references.rms_norm(values_of(x, dtype), values_of(weight, dtype), 1e-5)
    assert_close(read(out), expected, allowed(dtype, expected), "rms_norm")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_rounds_the_residual_and_norms_what_it_stored(rand, shape, dtype):
    x, residual, weight = rand.normal(*shape), rand.normal(*shape), 1.0 + rand.normal(shape[1], scale=0.1)
    stream, out = tensor(residual, dtype), unwritten(shape, dtype)
    cuda_ops.add_rms_norm(tensor(x, dtype), stream, tensor(weight, dtype), 1e-5, out)
    added = values_of(values_of(x, dtype) + values_of(residual, dtype), dtype)
    assert_same_bits(read(stream), added, "residual")
    expected = references.rms_norm(added, values_of(weight, dtype), 1e-5)
    assert_close(read(out), expected, allowed(dtype, expected), "out")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_matches_numpy_far_from_zero(rand, shape, dtype):
    x = rand.normal(*shape) + 20.0
    weight, bias = 1.0 + rand.normal(shape[1], scale=0.1), rand.normal(shape[1])
    out = unwritten(shape, dtype)
    cuda_ops.layer_norm(tensor(x, dtype), tensor(weight, dtype), tensor(bias, dtype), 1e-6, out)
    expected = references.layer_norm(
        values_of(x, dtype), values_of(weight, dtype), values_of(bias, dtype), 1e-6
    )
    assert_close(read(out), expected, 20 * allowed(dtype, expected), "layer_norm")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_silu_mul_multiplies_silu_of_the_first_half_with_the_second(rand, shape, dtype):
    m, width = shape
    gate_up = rand.normal(m, 2 * width, scale=4.0)
    out = unwritten(shape, dtype)
    cuda_ops.silu_mul(tensor(gate_up, dtype), out)
    given = values_of(gate_up, dtype).astype(np.float64)
    expected = references.silu(given[:, :width]) * given[:, width:]
    assert_close(read(out), expected, allowed(dtype, expected), "silu_mul")


def test_silu_of_extreme_gates_is_zero_or_the_gate():
    gate_up = np.array([[-200.0, -90.0, 90.0, 200.0, 1.0, 1.0, 1.0, 1.0]], np.float32)
    out = unwritten((1, 4), "float32")
    cuda_ops.silu_mul(gate_up, out)
    assert_close(out, np.array([[0.0, 0.0, 90.0, 200.0]]), 1e-5, "silu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_row_has_the_same_bits_alone_and_among_others(rand, dtype):
    x, weight = rand.normal(17, 1000), rand.normal(1000)
    whole, alone = unwritten((17, 1000), dtype), unwritten((1, 1000), dtype)
    cuda_ops.set_num_threads(2)
    try:
        cuda_ops.rms_norm(tensor(x, dtype), tensor(weight, dtype), 1e-5, whole)
    finally:
        cuda_ops.set_num_threads(1)
    cuda_ops.rms_norm(tensor(x[11:12], dtype), tensor(weight, dtype), 1e-5, alone)
    assert_same_bits(read(alone)[0], read(whole)[11])

"""Embedding, scattering, pixels and weight quantisation."""

from __future__ import annotations

import numpy as np
import pytest

import cuda_ops
from tests.checks import assert_close, assert_same_bits
from tests.cuda_ops import references
from tests.cuda_ops.builders import DTYPES, allowed, bf16, read, rounded, tensor, unwritten, values_of


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_shards_sum_to_the_whole_table(rand, dtype):
    table = rand.normal(12, 6)
    ids = np.array([0, 11, 5, 6, 5, 3], np.int32)
    total = np.zeros((6, 6), np.float32)
    for start in (0, 6):
        out = unwritten((6, 6), dtype)
        cuda_ops.embed_tokens(ids, tensor(table[start : start + 6], dtype), start, out)
        total += read(out)
    assert_same_bits(total, values_of(table, dtype)[ids])


def test_embedding_of_no_tokens_is_fine(rand):
    cuda_ops.embed_tokens(np.zeros(0, np.int32), rand.normal(4, 3), 0, np.zeros((0, 3), np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_rows_replaces_named_rows_only(rand, dtype):
    out, source = tensor(np.ones((5, 3)), dtype), rand.normal(2, 3)
    cuda_ops.scatter_rows(tensor(source, dtype), np.array([4, 1], np.int32), out)
    expected = np.ones((5, 3), np.float32)
    expected[[4, 1]] = values_of(source, dtype)
    assert_same_bits(read(out), expected)


def test_scatter_outside_the_output_is_refused(rand):
    with pytest.raises(ValueError, match="scatter_rows: rows must lie inside out"):
        cuda_ops.scatter_rows(rand.normal(1, 3), np.array([5], np.int32), np.zeros((5, 3), np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalize_pixels_matches_the_golden_values(dtype):
    mean = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
    std = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
    patches = np.repeat(np.array([0, 127, 255], np.uint8)[:, None], 588, axis=1)
    out = unwritten((3, 588), dtype)
    cuda_ops.normalize_pixels(patches, mean, std, out)
    golden = np.array(
        [[-1.792263, -1.752097, -1.480220], [0.061738, 0.153889, 0.325729], [1.930336, 2.074884, 2.145897]]
    )
    assert_close(read(out), np.repeat(golden, 196, axis=1), max(2e-6, allowed(dtype, golden)), "pixels")


def test_normalize_pixels_matches_numpy_on_random_patches(rand):
    patches = rand.numpy.integers(0, 256, (41, 588)).astype(np.uint8)
    mean, std = rand.normal(3), 1.0 + np.abs(rand.normal(3))
    out = unwritten((41, 588), "float32")
    cuda_ops.normalize_pixels(patches, mean, std, out)
    assert_close(out, references.normalize_pixels(patches, mean, std), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_int8_rounds_the_scale_first_and_halves_away_from_zero(rand, dtype):
    weight = rand.normal(9, 37, scale=0.02)
    weight[4] = 0.0
    weight[5, :4] = [127.0, 0.5, -0.5, 2.5]  # scale exactly 1
    weight[5, 4:] = 0.0
    data, scales = np.full((9, 37), 99, np.int8), bf16(np.full(9, np.nan))
    cuda_ops.quantize_int8(tensor(weight, dtype), data, scales)
    given = values_of(weight, dtype)
    amax = np.abs(given).max(-1)
    expected_scales = rounded(np.where(amax > 0, amax / np.float32(127), 1).astype(np.float32))
    assert_same_bits(read(scales), expected_scales, "scales")
    q = references.round_half_away(given / expected_scales[:, None]).clip(-127, 127)
    assert_same_bits(data, q.astype(np.int8), "data")
    assert data[5, :4].tolist() == [127, 1, -1, 3] and read(scales)[4] == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [2, 32, 64])
def test_quantize_int4_packs_the_even_column_low(rand, group, dtype):
    weight = rand.normal(5, 128, scale=0.02)
    weight[2, :group] = 0.0
    data, scales = np.full((5, 64), 99, np.uint8), bf16(np.full((5, 128 // group), np.nan))
    cuda_ops.quantize_int4(tensor(weight, dtype), group, data, scales)
    given = values_of(weight, dtype).reshape(5, -1, group)
    amax = np.abs(given).max(-1)
    expected_scales = rounded(np.where(amax > 0, amax / np.float32(7), 1).astype(np.float32))
    assert_same_bits(read(scales), expected_scales, "scales")
    q = (
        references.round_half_away(given / expected_scales[..., None])
        .clip(-7, 7)
        .astype(np.int8)
        .reshape(5, 128)
    )
    low, high = (data & 15).astype(np.int8), (data >> 4).astype(np.int8)
    unpacked = np.stack([low, high], -1).reshape(5, 128)
    assert_same_bits(np.where(unpacked > 7, unpacked - 16, unpacked).astype(np.int8), q, "data")


def test_a_quantised_weight_multiplies_like_its_parts(rand):
    weight, x = rand.normal(6, 64), rand.normal(3, 64)
    data, scales = np.zeros((6, 32), np.uint8), bf16(np.zeros((6, 2)))
    cuda_ops.quantize_int4(weight, 32, data, scales)
    out = unwritten((3, 6), "float32")
    cuda_ops.linear(x, cuda_ops.Weight("int4", data, scales, 32), out)
    assert_close(out, x @ weight.T, 4.0, "16 % weight error leaves the sum near")
    assert np.corrcoef(out.ravel(), (x @ weight.T).ravel())[0, 1] > 0.97

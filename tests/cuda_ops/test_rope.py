"""Rotations of the decoder and the vision tower, and where K and V go."""

from __future__ import annotations

import numpy as np
import pytest

import cuda_ops
from tests.checks import assert_close, assert_same_bits
from tests.cuda_ops import references
from tests.cuda_ops.builders import DTYPES, allowed, read, tensor, unwritten, values_of


def inverse_frequencies(head_dim: int, theta: float = 500000.0) -> np.ndarray:
    return (theta ** (-2.0 * np.arange(head_dim // 2) / head_dim)).astype(np.float32)


def make_cos_sin(rand, m: int, head_dim: int) -> np.ndarray:
    positions = rand.numpy.integers(0, 5000, (3, m)).astype(np.int32)
    axis = rand.numpy.integers(0, 3, head_dim // 2).astype(np.int32)
    angles = references.rope_angles(positions, axis, inverse_frequencies(head_dim))
    return np.ascontiguousarray(angles, np.float32)


def test_rope_angles_take_each_pair_from_its_axis_up_to_long_contexts(rand):
    positions = rand.numpy.integers(0, 131072, (3, 37)).astype(np.int32)
    axis = rand.numpy.integers(0, 3, 64).astype(np.int32)
    inv_freq = inverse_frequencies(128)
    out = np.full((37, 64, 2), np.nan, np.float32)
    cuda_ops.rope_angles(positions, axis, inv_freq, out)
    assert_close(out, references.rope_angles(positions, axis, inv_freq), 1e-6, "cos_sin")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,nq,nkv,hd", [(0, 4, 2, 16), (1, 1, 1, 2), (7, 6, 2, 32), (19, 4, 4, 128)])
def test_rope_write_kv_rotates_and_fills_exactly_its_slots(rand, m, nq, nkv, hd, dtype):
    num_blocks, block_size = 7, 4
    qkv = rand.normal(m, (nq + 2 * nkv) * hd)
    cos_sin = make_cos_sin(rand, m, hd)
    slots = rand.numpy.permutation(num_blocks * block_size)[:m].astype(np.int32)
    shape = (num_blocks, nkv, block_size, hd)
    k_cache, v_cache, q_out = unwritten(shape, dtype), unwritten(shape, dtype), unwritten((m, nq, hd), dtype)
    cuda_ops.rope_write_kv(tensor(qkv, dtype), cos_sin, slots, k_cache, v_cache, q_out)

    given = values_of(qkv, dtype).reshape(m, nq + 2 * nkv, hd)
    q = references.rotate_adjacent(given[:, :nq], cos_sin)
    k = references.rotate_adjacent(given[:, nq : nq + nkv], cos_sin)
    assert_close(read(q_out), q, allowed(dtype, q), "q")
    keys = read(k_cache).transpose(0, 2, 1, 3).reshape(-1, nkv, hd)
    values = read(v_cache).transpose(0, 2, 1, 3).reshape(-1, nkv, hd)
    assert_close(keys[slots], k, allowed(dtype, k), "k")
    assert_same_bits(values[slots], given[:, nq + nkv :], "v")
    untouched = np.setdiff1d(np.arange(num_blocks * block_size), slots)
    assert np.isnan(keys[untouched]).all() and np.isnan(values[untouched]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p,heads,hd", [(0, 2, 16), (1, 1, 4), (33, 3, 80)])
def test_vision_rope_turns_halves_by_row_and_column(rand, p, heads, hd, dtype):
    qkv = rand.normal(p, 3, heads, hd)
    row_col = rand.numpy.integers(0, 150, (p, 2)).astype(np.int32)
    out = tensor(qkv, dtype)
    cuda_ops.vision_rope(out, row_col, 10000.0)
    given = values_of(qkv, dtype)
    for part in (0, 1):
        expected = references.vision_rope(given[:, part], row_col, 10000.0)
        assert_close(
            read(out)[:, part], expected, max(allowed(dtype, expected), 2e-6), "q" if part == 0 else "k"
        )
    assert_same_bits(read(out)[:, 2], given[:, 2], "v")


def test_a_slot_outside_the_cache_is_refused(rand):
    cache = unwritten((2, 1, 4, 2), "float32")
    arguments = (rand.normal(1, 6), make_cos_sin(rand, 1, 2), np.array([8], np.int32), cache, cache.copy())
    with pytest.raises(ValueError, match="rope_write_kv: slots must lie inside the KV cache"):
        cuda_ops.rope_write_kv(*arguments, unwritten((1, 1, 2), "float32"))

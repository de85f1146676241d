"""Norms, rope, lookups and pixels: the CUDA bodies against NumPy, through the emulator."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from cuda_ops.emulator import emulator
from tests.checks import assert_close, assert_same_bits
from tests.conftest import Rand

from .builders import BFLOAT16, FLOAT32, decode, empty, encode, reported, tolerance

DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
EPS = 1e-5


class KvShape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("num_blocks", "num_kv_heads", "block_size", "head_dim")]


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + EPS) * weight


@DTYPES
@pytest.mark.parametrize(("m", "h"), [(0, 64), (1, 8), (3, 24), (2, 2568), (1, 4096)])
def test_rms_norm_is_the_formula(rand: Rand, dtype: int, m: int, h: int) -> None:
    x, weight, out = encode(rand.normal(m, h), dtype), encode(rand.normal(h), dtype), empty((m, h), dtype)
    emulator().call("rms_norm", None, dtype, x, weight, EPS, out, m, h)
    expected = rms(decode(x), decode(weight))
    assert_close(decode(out), expected, tolerance(dtype, expected))


@DTYPES
def test_add_rms_norm_updates_the_residual_and_norms_what_is_stored(rand: Rand, dtype: int) -> None:
    m, h = 3, 2056
    x, residual = (encode(rand.normal(m, h), dtype) for _ in range(2))
    weight, out, before = encode(rand.normal(h), dtype), empty((m, h), dtype), decode(residual.copy())
    emulator().call("add_rms_norm", None, dtype, x, residual, weight, EPS, out, m, h)
    assert_same_bits(residual, encode(before + decode(x), dtype), "residual")
    expected = rms(decode(residual), decode(weight))
    assert_close(decode(out), expected, tolerance(dtype, expected))


@DTYPES
@pytest.mark.parametrize(("m", "h"), [(1, 8), (2, 1280), (1, 2056)])
def test_layer_norm_is_the_formula(rand: Rand, dtype: int, m: int, h: int) -> None:
    x = encode(rand.normal(m, h) + 3, dtype)
    weight, bias, out = encode(rand.normal(h), dtype), encode(rand.normal(h), dtype), empty((m, h), dtype)
    emulator().call("layer_norm", None, dtype, x, weight, bias, EPS, out, m, h)
    wide = decode(x).astype(np.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + EPS)
    expected = normal * decode(weight) + decode(bias)
    assert_close(decode(out), expected, tolerance(dtype, expected))


@DTYPES
@pytest.mark.parametrize(("m", "width"), [(0, 8), (1, 8), (5, 72), (2, 1032)])
def test_silu_mul_gates_the_second_half(rand: Rand, dtype: int, m: int, width: int) -> None:
    gate_up, out = encode(rand.normal(m, 2 * width, scale=3), dtype), empty((m, width), dtype)
    emulator().call("silu_mul", None, dtype, gate_up, out, m, width)
    gate, up = np.split(decode(gate_up).astype(np.float64), 2, axis=1)
    expected = gate / (1 + np.exp(-gate)) * up
    assert_close(decode(out), expected, tolerance(dtype, expected))


@DTYPES
def test_a_rows_bits_do_not_depend_on_its_batch(rand: Rand, dtype: int) -> None:
    m, h = 5, 1288
    x, weight, out = encode(rand.normal(m, h), dtype), encode(rand.normal(h), dtype), empty((m, h), dtype)
    emulator().call("rms_norm", None, dtype, x, weight, EPS, out, m, h)
    alone = empty((1, h), dtype)
    emulator().call("rms_norm", None, dtype, x[3:4].copy(), weight, EPS, alone, 1, h)
    assert_same_bits(alone[0], out[3])


def test_an_odd_width_is_refused() -> None:
    row = np.zeros(12, np.float32)
    with reported("rms_norm: the width of a row must be a multiple of 8"):
        emulator().call("rms_norm", None, FLOAT32, row, row, EPS, row, 1, 12)


@pytest.mark.parametrize("m", [0, 1, 7])
def test_rope_angles_pick_the_axis_of_each_frequency(rand: Rand, m: int) -> None:
    pairs = 16
    positions = rand.numpy.integers(0, 131072, (3, m)).astype(np.int32)
    axis = rand.numpy.integers(0, 3, pairs).astype(np.int32)
    inv_freq = (500000.0 ** (-np.arange(pairs) / pairs)).astype(np.float32)
    cos_sin = empty((m, pairs, 2), FLOAT32)
    emulator().call("rope_angles", None, positions, axis, inv_freq, cos_sin, m, pairs)
    angles = (positions[axis].T.astype(np.float32) * inv_freq).astype(np.float64)
    assert_close(cos_sin, np.stack([np.cos(angles), np.sin(angles)], -1), 1e-6)


@DTYPES
@pytest.mark.parametrize("head_dim", [8, 32, 128])
def test_rope_write_kv_turns_pairs_and_fills_only_its_slots(rand: Rand, dtype: int, head_dim: int) -> None:
    m, heads, kv_heads, num_blocks, block_size = 4, 4, 2, 3, 4
    qkv = encode(rand.normal(m, heads + 2 * kv_heads, head_dim), dtype)
    angles = rand.normal(m, head_dim // 2).astype(np.float64)
    cos_sin = np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
    slots = np.array([9, 0, -1, 7], np.int32)  # the third row is padding
    caches = [empty((num_blocks, kv_heads, block_size, head_dim), dtype) for _ in range(2)]
    q = empty((m, heads, head_dim), dtype)
    shape = KvShape(num_blocks, kv_heads, block_size, head_dim)
    emulator().call("rope_write_kv", None, dtype, qkv, cos_sin, slots, *caches, q, m, heads, (shape, []))

    wide = decode(qkv).astype(np.float64)
    even, odd, c, s = wide[..., 0::2], wide[..., 1::2], cos_sin[:, None, :, 0], cos_sin[:, None, :, 1]
    turned = np.stack([even * c - odd * s, odd * c + even * s], -1).reshape(wide.shape)
    assert_close(decode(q), turned[:, :heads], tolerance(dtype, turned), "q")
    k_cache, v_cache = (decode(cache) for cache in caches)
    for row, slot in enumerate(slots):
        if slot < 0:
            continue
        place = (slot // block_size, slice(None), slot % block_size)
        assert_close(k_cache[place], turned[row, heads : heads + kv_heads], tolerance(dtype, turned), "k")
        assert_same_bits(v_cache[place], decode(qkv)[row, heads + kv_heads :].copy(), "v")
    written = np.zeros((num_blocks, block_size), bool)
    written.reshape(-1)[slots[slots >= 0]] = True
    for cache in (k_cache, v_cache):
        assert (np.isnan(cache).all(axis=(1, 3)) == ~written).all()


@DTYPES
@pytest.mark.parametrize("head_dim", [16, 80])
def test_vision_rope_turns_half_split_pairs_by_row_and_column(rand: Rand, dtype: int, head_dim: int) -> None:
    p, heads, theta = 5, 2, 10000.0
    before = encode(rand.normal(p, 3, heads, head_dim), dtype)
    row_col, qkv = rand.numpy.integers(0, 300, (p, 2)).astype(np.int32), before.copy()
    emulator().call("vision_rope", None, dtype, qkv, row_col, theta, p, heads, head_dim)
    quarter = head_dim // 4
    inv = theta ** (-2 * np.arange(quarter) / (head_dim / 2))
    angles = np.concatenate([row_col[:, :1] * inv, row_col[:, 1:] * inv], axis=1)[:, None, None]
    a, b = np.split(decode(before)[:, :2].astype(np.float64), 2, axis=-1)
    c, s = np.cos(angles), np.sin(angles)
    expected = np.concatenate([a * c - b * s, b * c + a * s], axis=-1)
    assert_close(decode(qkv)[:, :2], expected, max(tolerance(dtype, expected), 1e-4))
    assert_same_bits(qkv[:, 2].copy(), before[:, 2].copy(), "v")


@DTYPES
def test_embed_tokens_gives_zeros_outside_of_the_shard(rand: Rand, dtype: int) -> None:
    vocab_local, h, start = 6, 24, 10
    table, ids = encode(rand.normal(vocab_local, h), dtype), np.array([10, 9, 15, 16, 12], np.int32)
    out = empty((len(ids), h), dtype)
    emulator().call("embed_tokens", None, dtype, ids, table, start, out, len(ids), vocab_local, h)
    expected = np.zeros_like(out)
    expected[[0, 2, 4]] = table[[0, 5, 2]]
    assert_same_bits(out, expected)


@DTYPES
def test_scatter_rows_leaves_the_others_alone(rand: Rand, dtype: int) -> None:
    source, out = encode(rand.normal(3, 40), dtype), encode(rand.normal(6, 40), dtype)
    expected, rows = out.copy(), np.array([4, 0, 5], np.int32)
    expected[rows] = source
    emulator().call("scatter_rows", None, dtype, source, rows, out, 3, 6, 40)
    assert_same_bits(out, expected)


@DTYPES
@pytest.mark.parametrize("p", [0, 1, 3])
def test_pixels_are_normalised_by_channel(rand: Rand, dtype: int, p: int) -> None:
    patches = rand.numpy.integers(0, 256, (p, 588)).astype(np.uint8)
    mean = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
    std = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
    out = empty((p, 588), dtype)
    emulator().call("normalize_pixels", None, patches, mean, std, dtype, out, p, 588)
    expected = (patches.reshape(p, 3, 196) / 255.0 - mean[:, None]) / std[:, None]
    assert_close(decode(out), expected.reshape(p, 588), tolerance(dtype, expected))


@pytest.mark.parametrize("size", [0, 1, 8, 2051])
def test_casts_round_to_nearest_even(rand: Rand, size: int) -> None:
    x, narrow, wide = rand.normal(size), empty((size,), BFLOAT16), empty((size,), FLOAT32)
    emulator().call("cast", None, FLOAT32, x, BFLOAT16, narrow, size)
    assert_same_bits(narrow, encode(x, BFLOAT16))
    emulator().call("cast", None, BFLOAT16, narrow, FLOAT32, wide, size)
    assert_same_bits(wide, decode(narrow))

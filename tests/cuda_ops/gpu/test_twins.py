"""The CUDA bodies say what the CPU bodies say: the same call on both, on numbers that bf16 holds exactly."""

from __future__ import annotations

import numpy as np
import pytest

import cuda_ops
from cuda_ops.emulator import emulator
from tests.checks import assert_close, assert_same_bits
from tests.conftest import Rand

from .builders import FLOAT32, decode, empty, from_bf16, rounded, to_bf16
from .test_attention import Cache, make_sequence, segment_attention, segments_of
from .test_moe import INERT, TEXT, VISION, make_experts, make_routing, route
from .test_row_kernels import EPS, KvShape

M, H = 5, 264


def assert_twins(device: np.ndarray, host: np.ndarray, tolerance: float = 2e-6) -> None:
    assert_close(device, host, tolerance * max(1.0, float(np.abs(host).max(initial=0))))


def test_norms_and_gating_agree(rand: Rand) -> None:
    x, weight, bias = rand.normal(M, H), rand.normal(H), rand.normal(H)
    device, host = empty((M, H), FLOAT32), empty((M, H), FLOAT32)

    emulator().call("rms_norm", None, FLOAT32, x, weight, EPS, device, M, H)
    cuda_ops.rms_norm(x, weight, EPS, host)
    assert_twins(device, host)

    emulator().call("layer_norm", None, FLOAT32, x, weight, bias, EPS, device, M, H)
    cuda_ops.layer_norm(x, weight, bias, EPS, host)
    assert_twins(device, host)

    before = rand.normal(M, H)
    residuals = [before.copy(), before.copy()]
    emulator().call("add_rms_norm", None, FLOAT32, x, residuals[0], weight, EPS, device, M, H)
    cuda_ops.add_rms_norm(x, residuals[1], weight, EPS, host)
    assert_same_bits(residuals[0], residuals[1])
    assert_twins(device, host)

    gate_up = rand.normal(M, 2 * H)
    emulator().call("silu_mul", None, FLOAT32, gate_up, device, M, H)
    cuda_ops.silu_mul(gate_up, host)
    assert_twins(device, host)


def test_rope_and_the_cache_agree(rand: Rand) -> None:
    heads, kv_heads, head_dim, pairs = 4, 2, 32, 16
    positions = rand.numpy.integers(0, 100000, (3, M)).astype(np.int32)
    axis = rand.numpy.integers(0, 3, pairs).astype(np.int32)
    inv_freq = (500000.0 ** (-np.arange(pairs) / pairs)).astype(np.float32)
    angles = [empty((M, pairs, 2), FLOAT32) for _ in range(2)]
    emulator().call("rope_angles", None, positions, axis, inv_freq, angles[0], M, pairs)
    cuda_ops.rope_angles(positions, axis, inv_freq, angles[1])
    assert_twins(angles[0], angles[1])

    qkv, slots = rand.normal(M, (heads + 2 * kv_heads) * head_dim), np.array([3, 9, 0, 11, 4], np.int32)
    shape = (3, kv_heads, 4, head_dim)
    device = [np.zeros(shape, np.float32), np.zeros(shape, np.float32), empty((M, heads, head_dim), FLOAT32)]
    host = [array.copy() for array in device]
    kv = (KvShape(3, kv_heads, 4, head_dim), [])
    emulator().call("rope_write_kv", None, FLOAT32, qkv, angles[1], slots, *device, M, heads, kv)
    cuda_ops.rope_write_kv(qkv, angles[1], slots, *host)
    for one, other in zip(device, host, strict=True):
        assert_twins(one, other)

    before = rand.normal(M, 3, 2, 16)
    patches = [before.copy(), before.copy()]
    row_col = rand.numpy.integers(0, 200, (M, 2)).astype(np.int32)
    emulator().call("vision_rope", None, FLOAT32, patches[0], row_col, 10000.0, M, 2, 16)
    cuda_ops.vision_rope(patches[1], row_col, 10000.0)
    assert_twins(patches[0], patches[1], 5e-5)  # angles of hundreds of radians, of which fp32 keeps 1e-5


def test_lookups_and_pixels_agree(rand: Rand) -> None:
    ids, table = np.array([7, 3, 12, 8, 0], np.int32), rand.normal(6, H)
    device, host = empty((M, H), FLOAT32), empty((M, H), FLOAT32)
    emulator().call("embed_tokens", None, FLOAT32, ids, table, 3, device, M, 6, H)
    cuda_ops.embed_tokens(ids, table, 3, host)
    assert_same_bits(device, host)

    rows, source = np.array([4, 1], np.int32), rand.normal(2, H)
    emulator().call("scatter_rows", None, FLOAT32, source, rows, device, 2, M, H)
    cuda_ops.scatter_rows(source, rows, host)
    assert_same_bits(device, host)

    pixels = rand.numpy.integers(0, 256, (2, 588)).astype(np.uint8)
    mean, std = rand.normal(3), 1 + rand.numpy.random(3).astype(np.float32)
    device, host = empty((2, 588), FLOAT32), empty((2, 588), FLOAT32)
    emulator().call("normalize_pixels", None, pixels, mean, std, FLOAT32, device, 2, 588)
    cuda_ops.normalize_pixels(pixels, mean, std, host)
    assert_twins(device, host)


def test_routing_and_experts_agree(rand: Rand) -> None:
    m, h, num_experts, top_k = 9, 576, 8, 3
    x, router = rounded(rand.normal(m, h)), rand.normal(2, num_experts, h, scale=0.1)
    bias = rand.normal(2, num_experts, scale=0.05)
    types = np.array([TEXT, VISION, INERT, TEXT, TEXT, VISION, VISION, INERT, TEXT], np.int32)
    ids, weights = route(to_bf16(x), router, bias, types, top_k)
    host_ids, host_weights = np.zeros((m, top_k), np.int32), np.zeros((m, top_k), np.float32)
    cuda_ops.route_experts(x, router, bias, types, top_k, 1e-12, host_ids, host_weights)
    same = (ids == host_ids).all(axis=1)  # two scores closer than fp32 tells may fall either way
    assert same.sum() >= m - 1
    assert_twins(weights[same], host_weights[same], 1e-5)

    experts, x = make_experts(rand, "bfloat16", widths=(64, 32), hidden=64), rounded(rand.normal(m, 64))
    ids, weights = make_routing(rand, m)
    ids[4] = -1
    pools = [tuple(cuda_ops.Weight("float32", weight.values) for weight in pool) for pool in experts.pools]
    host = empty((m, 64), FLOAT32)
    cuda_ops.moe_experts(x, ids, weights, pools, host)
    assert_twins(decode(experts.run(to_bf16(x), ids, weights)), host, 2**-7)


@pytest.mark.parametrize(("num_queries", "kv_len"), [(1, 290), (20, 300)])
def test_attention_agrees(rand: Rand, num_queries: int, kv_len: int) -> None:
    sequence = make_sequence(rand, num_queries, kv_len, 4, 2, 64)
    cache = Cache(4, 2, 64, 16, 24)
    table = cache.add(sequence.k, sequence.v, rand)
    device = cache.attend(sequence.q, [table], [num_queries], [kv_len])
    host = empty((num_queries, 256), FLOAT32)
    cuda_ops.paged_attention(
        from_bf16(sequence.q), from_bf16(cache.k), from_bf16(cache.v), np.array([table], np.int32),
        np.array([0, num_queries], np.int32), np.array([kv_len], np.int32), 0.125, host,
    )  # fmt: skip
    assert_twins(decode(device), host, 2**-6)


def test_segment_attention_agrees(rand: Rand) -> None:
    qkv, starts = segments_of(rand, [70, 3], 2, 80)
    host = empty((73, 160), FLOAT32)
    cuda_ops.segment_attention(from_bf16(qkv), starts, 80**-0.5, host)
    assert_twins(decode(segment_attention(qkv, starts)), host, 2**-6)

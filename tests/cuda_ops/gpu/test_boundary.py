"""Every op through its Python function on the emulated GPU: the way the workers call it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cuda_ops
from tests.checks import assert_close, assert_same_bits
from tests.conftest import Rand
from tests.cuda_ops.builders import bf16, make_weight, read, rounded, unwritten

from .structures import aligned


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with cuda_ops.emulated_device():
        yield
        cuda_ops.set_workspace(None)


def lend_workspace(size: int) -> None:
    cuda_ops.set_workspace(aligned(size, np.uint8))


def tiled(weight: cuda_ops.Weight, is_gated: bool = False) -> cuda_ops.TiledWeight:
    """A Weight, one or a stack, in tiles."""
    n, k = weight.out_features, weight.in_features
    tiles, scales = cuda_ops.tiled_shapes(weight.kind, n, k, weight.group)
    stack = tuple(weight.data.shape[:-2])
    made = cuda_ops.TiledWeight(
        weight.kind,
        aligned(int(np.prod((*stack, *tiles))), np.uint8).reshape(*stack, *tiles),
        None if scales is None else unwritten((*stack, *scales), "bfloat16"),
        weight.group,
        n,
        k,
        is_gated,
    )
    cuda_ops.tile_weight(weight, made)
    return made


def assert_bf16_close(actual: Any, expected: np.ndarray) -> None:
    assert_close(read(actual), expected, float(np.abs(expected).max(initial=1e-6)) * 2**-7)


def test_norms_and_gating(rand: Rand) -> None:
    x, weight, bias = rounded(rand.normal(3, 64)), rounded(rand.normal(64)), rounded(rand.normal(64))
    rms = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    out = unwritten((3, 64), "bfloat16")
    cuda_ops.rms_norm(bf16(x), bf16(weight), 1e-5, out)
    assert_bf16_close(out, rms)
    residual = bf16(np.zeros((3, 64)))
    cuda_ops.add_rms_norm(bf16(x), residual, bf16(weight), 1e-5, out)
    assert_bf16_close(out, rms)
    assert_same_bits(read(residual), x)
    cuda_ops.layer_norm(bf16(x), bf16(weight), bf16(bias), 1e-5, out)
    centred = x - x.mean(axis=1, keepdims=True)
    assert_bf16_close(out, centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * weight + bias)
    half = unwritten((3, 32), "bfloat16")
    cuda_ops.silu_mul(bf16(x), half)
    assert_bf16_close(half, x[:, :32] / (1 + np.exp(-x[:, :32])) * x[:, 32:])


def test_lookups_pixels_and_casts(rand: Rand) -> None:
    table, out = rounded(rand.normal(5, 16)), unwritten((3, 16), "bfloat16")
    cuda_ops.embed_tokens(np.array([4, 0, 9], np.int32), bf16(table), 2, out)
    assert_same_bits(read(out), np.stack([table[2], np.zeros(16), np.zeros(16)]).astype(np.float32))
    cuda_ops.scatter_rows(bf16(table[:1]), np.array([2], np.int32), out)
    assert_same_bits(read(out)[2], table[0])
    pixels, mean, std = rand.numpy.integers(0, 256, (2, 12)).astype(np.uint8), rand.normal(3), rand.normal(3)
    made = unwritten((2, 12), "float32")
    cuda_ops.normalize_pixels(pixels, mean, std, made)
    assert_close(made, (pixels / 255 - np.repeat(mean, 4)) / np.repeat(std, 4), 1e-3)
    wide = np.zeros((3, 16), np.float32)
    cuda_ops.cast(out, wide)
    assert_same_bits(wide, read(out))
    cuda_ops.bias_activation(out, bf16(np.ones(16)), "none")
    assert_same_bits(read(out), rounded(wide + 1))


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_a_tiled_weight_multiplies_as_its_matrix(rand: Rand, kind: str) -> None:
    weight, values = make_weight(rand, kind, 40, 64, 32)
    x, bias, out = rounded(rand.normal(3, 64)), rounded(rand.normal(40)), unwritten((3, 40), "float32")
    cuda_ops.linear(bf16(x), tiled(weight), out, bf16(bias))
    assert_close(out, x.astype(np.float64) @ values.T.astype(np.float64) + bias, 1e-3)


def test_a_weight_quantised_on_the_device_stays_near_its_matrix(rand: Rand) -> None:
    values = rounded(rand.normal(16, 64))
    data, scales = np.zeros((16, 32), np.uint8), unwritten((16, 2), "bfloat16")
    cuda_ops.quantize_int4(bf16(values), 32, data, scales)
    x, out = rounded(rand.normal(1, 64)), unwritten((1, 16), "float32")
    cuda_ops.linear(bf16(x), tiled(cuda_ops.Weight("int4", data, scales, 32)), out)
    assert_close(out, x @ values.T, 0.15 * np.abs(values).max() * np.abs(x).sum())


def test_routing_then_experts(rand: Rand) -> None:
    m, h, num_experts, top_k, width = 4, 64, 4, 2, 32
    x, router = rounded(rand.normal(m, h)), rand.normal(2, num_experts, h)
    parts = cuda_ops.router_parts(h)
    split = router.reshape(2 * num_experts, parts, h // parts).transpose(1, 0, 2).copy()
    shape = (parts, *cuda_ops.tiled_shapes("float32", 2 * num_experts, h // parts)[0])
    tiles = aligned(int(np.prod(shape)), np.uint8).reshape(shape)
    cuda_ops.tile_router(split, tiles)
    ids, weights = np.zeros((m, top_k), np.int32), np.zeros((m, top_k), np.float32)
    lend_workspace(cuda_ops.routing_workspace_bytes(m, h, 2, num_experts))
    types = np.array([0, 1, -1, 0], np.int32)
    cuda_ops.route_experts(
        bf16(x), tiles, np.zeros((2, num_experts), np.float32), types, top_k, 1e-12, ids, weights
    )
    logits = np.einsum("mh,meh->me", x.astype(np.float64), router[types].astype(np.float64))
    best = np.argsort(-logits, axis=1)[:, :top_k] + types[:, None] * num_experts
    assert ids[[0, 1, 3]].tolist() == best[[0, 1, 3]].tolist() and ids[2].tolist() == [-1, -1]

    pools, matrices = [], []
    for _ in range(2):
        up, up_values = make_weight(rand, "int4", 2 * width, h, 32, (num_experts,))
        down, down_values = make_weight(rand, "int4", h, width, 32, (num_experts,))
        pools.append((tiled(up, is_gated=True), tiled(down)))
        matrices.append((up_values, down_values))
    out = unwritten((m, h), "bfloat16")
    lend_workspace(cuda_ops.moe_workspace_bytes(m, h, top_k, width, 2 * num_experts))
    cuda_ops.moe_experts(bf16(x), ids, weights, pools, out)
    expected = np.zeros((m, h))
    for i, j in np.argwhere(ids >= 0):
        up_values, down_values = matrices[ids[i, j] // num_experts]
        gate, up = np.split(up_values[ids[i, j] % num_experts].astype(np.float64) @ x[i], 2)
        hidden = rounded(gate / (1 + np.exp(-gate)) * up)
        expected[i] += weights[i, j] * (down_values[ids[i, j] % num_experts].astype(np.float64) @ hidden)
    assert_bf16_close(out, expected)


def test_a_step_of_the_decoders_attention(rand: Rand) -> None:
    nq, nkv, hd, size, kv_len = 4, 2, 32, 16, 20
    positions = np.tile(np.arange(kv_len, dtype=np.int32), (3, 1))
    axis, inv_freq = np.zeros(hd // 2, np.int32), np.linspace(1, 0.1, hd // 2, dtype=np.float32)
    cos_sin = unwritten((kv_len, hd // 2, 2), "float32")
    cuda_ops.rope_angles(positions, axis, inv_freq, cos_sin)
    qkv = bf16(rand.normal(kv_len, (nq + 2 * nkv) * hd))
    k_cache, v_cache = (unwritten((3, nkv, size, hd), "bfloat16") for _ in range(2))
    q, out = unwritten((kv_len, nq, hd), "bfloat16"), unwritten((kv_len, nq * hd), "bfloat16")
    slots = np.concatenate([np.arange(32, 48), np.arange(0, 4)]).astype(np.int32)  # blocks 2, then 0
    cuda_ops.rope_write_kv(qkv, cos_sin, slots, k_cache, v_cache, q)
    batch = np.array([[2, 0]], np.int32), np.array([0, kv_len], np.int32), np.array([kv_len], np.int32)
    tasks = cuda_ops.attention_tasks([(kv_len, kv_len)], nq // nkv)
    memory = aligned(cuda_ops.attention_plan_bytes(*tasks, 1, nkv, hd), np.uint8)
    plan = cuda_ops.AttentionPlan(memory, *tasks)
    cuda_ops.plan_attention(plan, *batch, nq, nkv, hd, size)
    cuda_ops.paged_attention(q, k_cache, v_cache, *batch, 0.2, out, plan)

    queries = read(q).astype(np.float64)
    keys, values = (read(c).transpose(0, 2, 1, 3).reshape(-1, nkv, hd)[slots] for c in (k_cache, v_cache))
    keys, values = np.repeat(keys, 2, axis=1), np.repeat(values, 2, axis=1)
    scores = np.einsum("ihd,jhd->hij", queries, keys) * 0.2
    scores[:, ~np.tri(kv_len, dtype=bool)] = -np.inf
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = np.einsum("hij,jhd->ihd", p / p.sum(axis=-1, keepdims=True), values).reshape(kv_len, -1)
    assert_bf16_close(out, expected)


def test_the_towers_rope_and_attention(rand: Rand) -> None:
    qkv = bf16(rand.normal(6, 3, 2, 16))
    before = read(qkv).copy()
    cuda_ops.vision_rope(qkv, np.zeros((6, 2), np.int32), 10000.0)
    assert_same_bits(read(qkv), before)  # no turn at the origin
    out = unwritten((6, 32), "bfloat16")
    cuda_ops.segment_attention(qkv, np.array([0, 1, 6], np.int32), 0.25, out)
    assert_same_bits(read(out)[0], before[0, 2].reshape(-1))  # alone: its own value


def test_sampling_takes_the_best_token_of_greedy_rows(rand: Rand) -> None:
    rows, vocab = 2, 70
    logits = rand.normal(rows, vocab)
    best = logits.argmax(axis=1)
    zeros, ints, starts = np.zeros(rows, np.float32), np.zeros(rows, np.int32), np.zeros(rows + 1, np.int32)
    batch = cuda_ops.SamplingBatch(
        temperature=zeros, top_k=ints, top_p=zeros + 1, min_p=zeros, repetition=zeros + 1, presence=zeros,
        frequency=zeros, seeds=np.zeros(rows, np.int64), counters=np.zeros(rows, np.int64),
        history=np.zeros(0, np.int32), history_starts=starts, num_prompt_tokens=ints,
        banned=np.zeros(0, np.int32), banned_starts=starts, allowed_bits=np.full(3, -1, np.int32),
    )  # fmt: skip
    ids, logprobs = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
    lend_workspace(cuda_ops.sampling_workspace_bytes(rows, vocab))
    cuda_ops.sample_tokens(
        logits, batch, ids, logprobs, np.zeros((rows, 0), np.int32), np.zeros((rows, 0), np.float32)
    )
    assert ids.tolist() == best.tolist()


def test_a_lent_workspace_lives_until_another_is_lent() -> None:
    memory = aligned(256, np.uint8)
    life = weakref.ref(memory)
    cuda_ops.set_workspace(memory)
    del memory
    assert life() is not None, "it was freed while kernels may write to it"
    cuda_ops.set_workspace(None)
    assert life() is None


def test_a_plain_weight_on_the_device_is_refused_with_what_to_do(rand: Rand) -> None:
    weight, _ = make_weight(rand, "int8", 16, 64)
    with pytest.raises(RuntimeError, match="linear was called with tensors on a GPU: its weight must be"):
        cuda_ops.linear(bf16(np.ones((1, 64))), weight, bf16(np.ones((1, 16))))


def test_a_missing_workspace_is_named_with_its_size() -> None:
    ids, weights = np.zeros((1, 2), np.int32), np.zeros((1, 2), np.float32)
    tiles = np.zeros((1, 1, 1, 4096), np.uint8)
    with pytest.raises(ValueError, match="route_experts: it needs a workspace of 16 bytes"):
        cuda_ops.route_experts(
            bf16(np.ones((1, 64))), tiles, np.zeros((1, 4), np.float32), np.zeros(1, np.int32), 2, 0.0,
            ids, weights,
        )  # fmt: skip


def test_a_kernel_that_leaves_its_arrays_is_reported_by_the_op() -> None:
    rows = np.array([7], np.int32)  # scatter_rows leaves out what is outside, so use a table that is not
    table = np.ones((2, 8), np.float32)
    out = np.zeros((1, 8), np.float32)
    cuda_ops.embed_tokens(rows, table, 0, out)
    assert (out == 0).all()
    with pytest.raises(ValueError, match=r"rope_write_kv: a kernel failed in the emulator: .*rope_write_kv"):
        kv = np.zeros((1, 1, 4, 8), np.float32)
        cuda_ops.rope_write_kv(
            np.ones((1, 24), np.float32), np.ones((1, 4, 2), np.float32), np.array([4], np.int32), kv,
            kv.copy(), np.ones((1, 1, 8), np.float32),
        )  # fmt: skip


def test_ranks_sum_through_memory_that_they_map(rand: Rand) -> None:
    import threading
    from concurrent.futures import ThreadPoolExecutor

    world = 2
    parts = [rounded(rand.normal(3, 16)) for _ in range(world)]
    handles, all_there = np.zeros((world, 64), np.uint8), threading.Barrier(world)

    def exchange(rank: int, own: np.ndarray) -> np.ndarray:
        handles[rank] = own
        all_there.wait(30)
        return handles

    def one(rank: int) -> tuple[np.ndarray, np.ndarray]:
        group = cuda_ops.PeerGroup(rank, world, 64, lambda own: exchange(rank, own))
        total, out = unwritten((3, 16), "bfloat16"), unwritten((3, 16), "bfloat16")
        group.all_reduce(bf16(parts[rank]), total)
        residual = bf16(np.zeros((3, 16)))
        group.all_reduce_add_rms_norm(bf16(parts[rank]), residual, bf16(np.ones(16)), 0.0, out)
        all_there.wait(30)
        group.close()
        return read(total), read(out)

    with ThreadPoolExecutor(world) as pool:
        results = list(pool.map(one, range(world), timeout=60))
    summed = rounded(parts[0] + parts[1])
    for total, out in results:
        assert_same_bits(total, summed)
        assert_close(out, summed / np.sqrt((summed**2).mean(axis=1, keepdims=True)), 0.02)

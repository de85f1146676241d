"""The int8 KV cache on the emulated GPU: its rounding to the bit, and attention over what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import cuda_ops
from cuda_ops.emulator import emulator
from cuda_ops.library import library
from tests.checks import assert_close, assert_same_bits
from tests.conftest import Rand
from tests.cuda_ops.builders import bf16, read, rounded, unwritten

from .builders import NEEDS_HOOKS
from .structures import aligned
from .test_attention import softmax_attention
from .test_costs import conflicts

BLOCK = 16


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with cuda_ops.emulated_device():
        yield


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(q int8, scales fp32 that bf16 holds) over the last axis, by the rule in cuda_ops/README.md."""
    scales = rounded((np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)).astype(np.float32))
    scales[scales == 0] = 1
    q = np.clip(np.trunc(x / scales + np.copysign(np.float32(0.5), x)), -127, 127)
    return q.astype(np.int8), scales[..., 0]


@dataclass
class Sequence:
    q: np.ndarray  # [n, heads, hd]
    k: np.ndarray  # [len, kv heads, hd] int8
    v: np.ndarray
    k_scales: np.ndarray  # [len, kv heads]
    v_scales: np.ndarray

    @property
    def expected(self) -> np.ndarray:
        n, length = len(self.q), len(self.k)
        k, v = self.k * self.k_scales[..., None], self.v * self.v_scales[..., None]
        return softmax_attention(self.q, k, v, length - n + 1 + np.arange(n))


def make_sequence(rand: Rand, n: int, length: int, heads: int, kv_heads: int, hd: int) -> Sequence:
    k, v = (rand.normal(length, kv_heads, hd) * rand.numpy.uniform(0.2, 3, (length, 1, 1)) for _ in range(2))
    (k, k_scales), (v, v_scales) = quantized(k.astype(np.float32)), quantized(v.astype(np.float32))
    return Sequence(rounded(rand.normal(n, heads, hd)), k, v, k_scales, v_scales)


def attend(sequences: list[Sequence]) -> np.ndarray:
    """paged_attention of a batch; unused slots hold extreme keys and values, and scales of NaN."""
    heads, hd = sequences[0].q.shape[1:]
    kv_heads = sequences[0].k.shape[1]
    lens = [len(s.k) for s in sequences]
    num_blocks = sum(-(-length // BLOCK) for length in lens) + 1
    caches = np.full((2, num_blocks, kv_heads, BLOCK, hd), -128, np.int8)
    scales = np.full((2, num_blocks, kv_heads, BLOCK), np.nan, np.float32)
    tables = np.full((len(sequences), max(-(-length // BLOCK) for length in lens)), -1, np.int32)
    free = num_blocks
    for row, s in enumerate(sequences):
        for block in range(-(-len(s.k) // BLOCK)):
            free -= 1
            tables[row, block] = free
            part = slice(block * BLOCK, block * BLOCK + BLOCK)
            size = len(s.k[part])
            for kind, (data, scale) in enumerate([(s.k, s.k_scales), (s.v, s.v_scales)]):
                caches[kind, free, :, :size] = data[part].transpose(1, 0, 2)
                scales[kind, free, :, :size] = scale[part].T
    starts = np.concatenate([[0], np.cumsum([len(s.q) for s in sequences])]).astype(np.int32)
    batch = tables, starts, np.array(lens, np.int32)
    tasks = cuda_ops.attention_tasks([(len(s.q), len(s.k)) for s in sequences], heads // kv_heads)
    memory = aligned(cuda_ops.attention_plan_bytes(*tasks, len(sequences), kv_heads, hd), np.uint8)
    plan = cuda_ops.AttentionPlan(memory, *tasks)
    cuda_ops.plan_attention(plan, *batch, heads, kv_heads, hd, BLOCK)
    q = np.concatenate([s.q for s in sequences])
    out = unwritten((len(q), heads * hd), "bfloat16")
    cuda_ops.paged_attention(
        bf16(q), caches[0], caches[1], *batch, hd**-0.5, out, plan, bf16(scales[0]), bf16(scales[1])
    )
    return read(out)


def assert_attention(out: np.ndarray, expected: np.ndarray) -> None:
    assert_close(out, expected, np.abs(expected).max() * 2**-6)


@pytest.mark.parametrize("hd", [32, 64, 128])
@pytest.mark.parametrize("length", [1, 63, 257, 330])
def test_decode_weighs_each_token_by_its_scales(rand: Rand, hd: int, length: int) -> None:
    sequence = make_sequence(rand, 1, length, 4, 2, hd)
    assert_attention(attend([sequence]), sequence.expected)


@pytest.mark.parametrize(("n", "length"), [(9, 9), (33, 300)])
@pytest.mark.parametrize("hd", [64, 128])
def test_prefill_is_causal(rand: Rand, n: int, length: int, hd: int) -> None:
    sequence = make_sequence(rand, n, length, 4, 1, hd)
    assert_attention(attend([sequence]), sequence.expected)


def test_a_query_has_the_same_bits_decoded_and_prefilled(rand: Rand) -> None:
    whole = make_sequence(rand, 20, 300, 4, 1, 32)
    other = make_sequence(rand, 1, 40, 4, 1, 32)
    prefilled = attend([other, whole])[1:]
    for end in (300, 285):
        part = slice(0, end)
        one = Sequence(whole.q[20 - 301 + end :][:1], whole.k[part], whole.v[part], whole.k_scales[part],
                       whole.v_scales[part])  # fmt: skip
        assert_same_bits(attend([one])[0], prefilled[20 - 301 + end])


@pytest.mark.parametrize("hd", [8, 32, 128])
def test_keys_and_values_are_rounded_by_the_rule(rand: Rand, hd: int) -> None:
    m, nq, nkv, blocks = 5, 3, 2, 2
    qkv = rounded(rand.normal(m, nq + 2 * nkv, hd))
    qkv[2, nq] = 0  # zeros have scale 1
    turned = np.zeros((m, hd // 2, 2), np.float32)
    turned[..., 1] = 1  # a quarter turn: (a, b) -> (-b, a), exactly
    slots = np.array([17, 3, 0, -1, 31], np.int32)
    caches = [np.full((blocks, nkv, BLOCK, hd), 99, np.int8) for _ in range(2)]
    scales = [unwritten((blocks, nkv, BLOCK), "bfloat16") for _ in range(2)]
    q_out = unwritten((m, nq, hd), "bfloat16")
    flat = bf16(qkv.reshape(m, -1))
    cuda_ops.rope_write_kv(flat, turned, slots, *caches, q_out, *scales)

    turned_qk = np.stack([-qkv[..., 1::2], qkv[..., 0::2]], -1).reshape(qkv.shape)
    assert_same_bits(read(q_out) + 0.0, turned_qk[:, :nq] + 0.0)
    for cache, scale, rows in zip(
        caches, scales, [turned_qk[:, nq : nq + nkv], qkv[:, nq + nkv :]], strict=True
    ):
        q, expected_scales = quantized(rows)
        for row, slot in enumerate(slots):
            if slot < 0:
                continue
            assert_same_bits(cache[slot // BLOCK, :, slot % BLOCK], q[row])
            assert_same_bits(read(scale)[slot // BLOCK, :, slot % BLOCK], expected_scales[row])
        written = [divmod(int(slot), BLOCK) for slot in slots if slot >= 0]
        others = [(b, o) for b in range(blocks) for o in range(BLOCK) if (b, o) not in written]
        assert all((cache[b, :, o] == 99).all() for b, o in others), "a slot of nobody was written"


def test_caches_without_scales_or_with_one_alone_are_refused(rand: Rand) -> None:
    cache = np.zeros((1, 1, BLOCK, 8), np.int8)
    arguments: list[Any] = [
        bf16(np.zeros((1, 24))), np.zeros((1, 4, 2), np.float32), np.zeros(1, np.int32), cache, cache.copy(),
        bf16(np.zeros((1, 1, 8))),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"rope_write_kv: k_cache must be .* float32\|bfloat16"):
        cuda_ops.rope_write_kv(*arguments)
    with pytest.raises(ValueError, match="rope_write_kv: k_scales and v_scales come together"):
        cuda_ops.rope_write_kv(*arguments, bf16(np.zeros((1, 1, BLOCK))), None)


@NEEDS_HOOKS
@pytest.mark.parametrize("n", [1, 20])
def test_tiles_of_128_columns_are_read_without_bank_conflicts(rand: Rand, n: int) -> None:
    with emulator().profile() as costs:
        attend([make_sequence(rand, n, 130, 8, 1, 128)])
    assert not conflicts(costs, "attention_int8.cuh", "paged_attention.cu")


def test_the_cpu_writes_the_same_cache_and_attends_alike(rand: Rand) -> None:
    m, nq, nkv, hd, blocks = 20, 4, 2, 32, 3
    qkv = bf16(rand.normal(m, (nq + 2 * nkv) * hd))
    angles = rand.normal(m, hd // 2)
    cos_sin = np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
    table, slots = np.array([[2, 0]], np.int32), np.concatenate([np.arange(32, 48), np.arange(4)])
    starts, lens = np.array([0, m], np.int32), np.array([m], np.int32)

    def write() -> tuple[list[np.ndarray], list[Any], Any]:
        caches = [np.zeros((blocks, nkv, BLOCK, hd), np.int8) for _ in range(2)]
        scales = [bf16(np.ones((blocks, nkv, BLOCK))) for _ in range(2)]
        q = unwritten((m, nq, hd), "bfloat16")
        cuda_ops.rope_write_kv(qkv, cos_sin, slots.astype(np.int32), *caches, q, *scales)
        return caches, scales, q

    caches, scales, q = write()
    tasks = cuda_ops.attention_tasks([(m, m)], nq // nkv)
    plan = cuda_ops.AttentionPlan(
        aligned(cuda_ops.attention_plan_bytes(*tasks, 1, nkv, hd), np.uint8), *tasks
    )
    cuda_ops.plan_attention(plan, table, starts, lens, nq, nkv, hd, BLOCK)
    out, host_out = (unwritten((m, nq * hd), "bfloat16") for _ in range(2))
    cuda_ops.paged_attention(q, *caches, table, starts, lens, 0.2, out, plan, *scales)
    with on_host():
        host_caches, host_scales, _ = write()
        cuda_ops.paged_attention(q, *caches, table, starts, lens, 0.2, host_out, None, *scales)

    for one, other in zip(caches, host_caches, strict=True):  # a fused multiply may tip a rounding over
        assert np.abs(one.astype(int) - other).max() <= 1 and (one != other).mean() < 0.01
    for one, other in zip(scales, host_scales, strict=True):
        assert_close(read(one), read(other), float(read(one).max()) * 2**-8)
    assert_attention(read(out), read(host_out))


@contextmanager
def on_host() -> Iterator[None]:
    """The CPU's bodies for a while, in a test of the emulated device's."""
    library.emulate_device(False)
    try:
        yield
    finally:
        library.emulate_device(True)

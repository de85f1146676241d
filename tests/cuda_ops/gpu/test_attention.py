"""Paged and segment attention: the CUDA bodies against NumPy, and a query's bits however it is reached."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest

from cuda_ops.emulator import emulator
from tests.checks import assert_close, assert_same_bits
from tests.conftest import Rand

from .builders import BFLOAT16, NAN_BF16, decode, empty, from_bf16, reported, to_bf16
from .structures import aligned
from .test_row_kernels import KvShape


class PagedBatch(ctypes.Structure):
    _fields_ = [
        ("block_tables", ctypes.c_void_p),
        ("query_starts", ctypes.c_void_p),
        ("kv_lens", ctypes.c_void_p),
        ("num_sequences", ctypes.c_int64),
        ("max_blocks", ctypes.c_int64),
    ]


class AttentionLimits(ctypes.Structure):
    _fields_ = [("short_tasks", ctypes.c_int64), ("long_tasks", ctypes.c_int64)]


@dataclass
class Cache:
    """A paged KV cache whose unused slots hold NaN, and the sequences in it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    num_blocks: int
    k: np.ndarray = field(init=False)
    v: np.ndarray = field(init=False)
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.num_blocks, self.num_kv_heads, self.block_size, self.head_dim)
        self.k, self.v = (np.full(shape, NAN_BF16) for _ in range(2))
        self.free = list(range(self.num_blocks))

    def add(self, keys: np.ndarray, values: np.ndarray, rand: Rand) -> list[int]:
        """Store [kv_len, kv_heads, head_dim] bf16 in blocks of random place; returns the block table."""
        table = []
        for begin in range(0, len(keys), self.block_size):
            block = self.free.pop(int(rand.numpy.integers(len(self.free))))
            size = min(self.block_size, len(keys) - begin)
            self.k[block, :, :size] = keys[begin : begin + size].transpose(1, 0, 2)
            self.v[block, :, :size] = values[begin : begin + size].transpose(1, 0, 2)
            table.append(block)
        return table

    def attend(
        self, q: np.ndarray, tables: list[list[int]], num_queries: list[int], kv_lens: list[int]
    ) -> np.ndarray:
        """paged_attention of a batch; q [M, heads, head_dim] may end with rows of no sequence."""
        m, group = len(q), self.num_heads // self.num_kv_heads
        block_tables = np.full((len(tables), max(map(len, tables), default=0) or 1), -1, np.int32)
        for row, table in enumerate(tables):
            block_tables[row, : len(table)] = table
        starts = np.concatenate([[0], np.cumsum(num_queries)]).astype(np.int32)
        lens = np.array(kv_lens, np.int32)
        batch = PagedBatch(
            block_tables.ctypes.data, starts.ctypes.data, lens.ctypes.data, len(tables), block_tables.shape[1]
        )
        limits = AttentionLimits(0, 0)
        for n, length in zip(num_queries, kv_lens, strict=True):
            if 0 < n * group <= 16:
                limits.short_tasks += -(-length // 256)
            else:
                limits.long_tasks += -(-n * group // 128) * -(-length // 4096)
        size = emulator().number(
            "paged_attention_workspace_bytes", limits.short_tasks, limits.long_tasks, len(tables),
            self.num_kv_heads, self.head_dim,
        )  # fmt: skip
        workspace, out = aligned(size, np.uint8), empty((m, self.num_heads * self.head_dim), BFLOAT16)
        batched = (batch, [block_tables, starts, lens])
        kv = (KvShape(self.num_blocks, self.num_kv_heads, self.block_size, self.head_dim), [])
        emulator().call("plan_attention", None, batched, m, self.num_heads, kv, (limits, []), workspace)
        emulator().call(
            "paged_attention", None, q, self.k, self.v, batched, self.head_dim**-0.5, out,
            m, self.num_heads, kv, (limits, []), workspace,
        )  # fmt: skip
        return out


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """q [n, heads, hd], k, v [len, kv_heads, hd]; query i sees the first visible[i] keys. [n, heads * hd]"""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.einsum("nhd,lhd->nhl", q.astype(np.float64), k) * q.shape[2] ** -0.5
    scores = np.where(np.arange(len(k)) < visible[:, None, None], scores, -np.inf)
    p = np.exp(scores - scores.max(axis=2, keepdims=True))
    return (np.einsum("nhl,lhd->nhd", p, v) / p.sum(axis=2)[..., None]).reshape(len(q), -1)


@dataclass
class Sequence:
    q: np.ndarray  # [n, heads, hd] bf16
    k: np.ndarray  # [len, kv_heads, hd] bf16
    v: np.ndarray

    @property
    def expected(self) -> np.ndarray:
        n, length = len(self.q), len(self.k)
        return softmax_attention(
            from_bf16(self.q), from_bf16(self.k), from_bf16(self.v), length - n + 1 + np.arange(n)
        )


def make_sequence(
    rand: Rand, num_queries: int, kv_len: int, num_heads: int, kv_heads: int, head_dim: int
) -> Sequence:
    return Sequence(
        to_bf16(rand.normal(num_queries, num_heads, head_dim)),
        to_bf16(rand.normal(kv_len, kv_heads, head_dim)),
        to_bf16(rand.normal(kv_len, kv_heads, head_dim)),
    )


def run_batch(rand: Rand, sequences: list[Sequence], padding: int = 0, block_size: int = 16) -> np.ndarray:
    num_heads, head_dim = sequences[0].q.shape[1:]
    kv_heads = sequences[0].k.shape[1]
    num_blocks = sum(-(-len(s.k) // block_size) for s in sequences) + 3
    cache = Cache(num_heads, kv_heads, head_dim, block_size, num_blocks)
    tables = [cache.add(s.k, s.v, rand) for s in sequences]
    q = np.concatenate([s.q for s in sequences] + [np.full((padding, num_heads, head_dim), NAN_BF16)])
    return cache.attend(q, tables, [len(s.q) for s in sequences], [len(s.k) for s in sequences])


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("kv_len", [1, 63, 64, 257, 530])
def test_decode_sees_every_key_once(rand: Rand, head_dim: int, kv_len: int) -> None:
    sequence = make_sequence(rand, 1, kv_len, 4, 2, head_dim)
    out = decode(run_batch(rand, [sequence]))
    assert_close(out, sequence.expected, np.abs(sequence.expected).max() * 2**-6)


@pytest.mark.parametrize(("num_queries", "kv_len"), [(9, 9), (40, 40), (33, 300), (17, 64)])
def test_prefill_is_causal(rand: Rand, num_queries: int, kv_len: int) -> None:
    sequence = make_sequence(rand, num_queries, kv_len, 8, 2, 64)
    out = decode(run_batch(rand, [sequence]))
    assert_close(out, sequence.expected, np.abs(sequence.expected).max() * 2**-6)


def test_a_batch_mixes_lengths_prefill_and_padding(rand: Rand) -> None:
    shapes = [(1, 300), (20, 20), (2, 70), (1, 1), (50, 130)]
    sequences = [make_sequence(rand, n, length, 5, 1, 32) for n, length in shapes]  # groups of five heads
    out = decode(run_batch(rand, sequences, padding=3, block_size=32))
    expected = np.concatenate([s.expected for s in sequences] + [np.zeros((3, 160))])
    assert_close(out, expected, np.abs(expected).max() * 2**-6)


def test_a_sequence_of_no_keys_or_no_queries_disturbs_nobody(rand: Rand) -> None:
    sequence = make_sequence(rand, 1, 20, 4, 1, 32)
    cache = Cache(4, 1, 32, 16, 4)
    table = cache.add(sequence.k, sequence.v, rand)
    q = np.concatenate([np.full((1, 4, 32), NAN_BF16), sequence.q])
    out = decode(cache.attend(q, [[], [], table], [1, 0, 1], [0, 5, 20]))
    assert (out[0] == 0).all()
    assert_close(out[1:], sequence.expected, np.abs(sequence.expected).max() * 2**-6)


def test_more_sequences_than_the_plan_has_threads_are_all_served(rand: Rand) -> None:
    sequences = [make_sequence(rand, 1 + i % 9, 9 + i % 4, 2, 1, 32) for i in range(260)]
    out = decode(run_batch(rand, sequences))
    expected = np.concatenate([s.expected for s in sequences])
    assert_close(out, expected, np.abs(expected).max() * 2**-6)


def test_a_query_has_the_same_bits_decoded_prefilled_or_in_chunks(rand: Rand) -> None:
    kv_len = 600  # three segments
    whole = make_sequence(rand, 40, kv_len, 8, 1, 32)
    prefilled = run_batch(rand, [whole])

    def suffix(num_queries: int, end: int) -> np.ndarray:
        """The queries of positions [end - n, end) of the same sequence, run as a step of its own."""
        first = end - num_queries - (kv_len - 40)
        part = Sequence(whole.q[first : first + num_queries], whole.k[:end], whole.v[:end])
        other = make_sequence(rand, 3, 77, 8, 1, 32)
        return run_batch(rand, [other, part])[3:]

    for position in (40, 39, 18, 1):  # decoded one by one
        assert_same_bits(suffix(1, kv_len - 40 + position)[0], prefilled[position - 1])
    assert_same_bits(suffix(25, kv_len), prefilled[15:].copy())
    assert_same_bits(suffix(15, kv_len - 25), prefilled[:15].copy())
    assert_same_bits(suffix(2, kv_len), prefilled[38:].copy())


def test_spans_of_a_long_context_merge_the_same_in_decode_and_prefill(rand: Rand) -> None:
    kv_len = 4096 + 300  # two spans
    whole = make_sequence(rand, 9, kv_len, 2, 1, 32)
    prefilled = run_batch(rand, [whole], block_size=64)
    assert_close(decode(prefilled), whole.expected, np.abs(whole.expected).max() * 2**-5)
    last = Sequence(whole.q[-1:], whole.k, whole.v)
    assert_same_bits(run_batch(rand, [last], block_size=64)[0], prefilled[-1])


def test_a_head_that_no_layout_knows_is_refused(rand: Rand) -> None:
    with reported("head_dim must be 32, 64 or 128"):
        run_batch(rand, [make_sequence(rand, 1, 4, 2, 1, 48)])


def segments_of(rand: Rand, sizes: list[int], heads: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    qkv = to_bf16(rand.normal(sum(sizes), 3, heads, head_dim))
    return qkv, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)


def segment_attention(qkv: np.ndarray, starts: np.ndarray) -> np.ndarray:
    p, _, heads, head_dim = qkv.shape
    out = empty((p, heads * head_dim), BFLOAT16)
    emulator().call(
        "segment_attention", None, qkv, starts, len(starts) - 1, head_dim**-0.5, out, p, heads, head_dim
    )
    return out


@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("sizes", [[1], [7, 64, 3], [150], [0, 40, 0, 130]])
def test_patches_see_their_whole_segment_and_nothing_else(
    rand: Rand, head_dim: int, sizes: list[int]
) -> None:
    qkv, starts = segments_of(rand, sizes, 2, head_dim)
    out, wide = decode(segment_attention(qkv, starts)), from_bf16(qkv)
    for begin, end in itertools.pairwise(starts):
        if begin == end:
            continue
        part = wide[begin:end]
        expected = softmax_attention(part[:, 0], part[:, 1], part[:, 2], np.full(end - begin, end - begin))
        assert_close(out[begin:end], expected, np.abs(expected).max() * 2**-6, f"patches {begin} to {end}")


def test_a_segment_has_the_same_bits_alone_and_packed(rand: Rand) -> None:
    qkv, starts = segments_of(rand, [30, 200, 5], 1, 80)
    together = segment_attention(qkv, starts)
    alone = segment_attention(qkv[30:230].copy(), np.array([0, 200], np.int32))
    assert_same_bits(alone, together[30:230].copy())


def test_patches_of_no_segment_are_zeros(rand: Rand) -> None:
    qkv, _ = segments_of(rand, [10], 1, 16)
    out = segment_attention(qkv, np.array([0, 4], np.int32))
    assert (out[4:] == 0).all() and not np.isnan(decode(out)).any()


def test_no_patch_is_no_launch() -> None:
    assert segment_attention(np.zeros((0, 3, 2, 16), np.uint16), np.array([0], np.int32)).shape == (0, 32)

"""Paged and segment attention against NumPy; chunking, batching and threads must not change a bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import cuda_ops
from tests.checks import assert_close, assert_same_bits
from tests.cuda_ops import references
from tests.cuda_ops.builders import DTYPES, allowed, read, tensor, unwritten, values_of


class Cache:
    """Sequences in shuffled blocks of a cache whose unused slots hold NaN."""

    def __init__(self, rand, kv_lens, nq, nkv, hd, dtype="float32", block_size=4):
        self.dtype, self.nq, self.hd = dtype, nq, hd
        self.scale = hd**-0.5
        self.q = [values_of(rand.normal(n, nq, hd), dtype) for n in kv_lens]
        self.k = [values_of(rand.normal(n, nkv, hd), dtype) for n in kv_lens]
        self.v = [values_of(rand.normal(n, nkv, hd), dtype) for n in kv_lens]
        needed = [-(-n // block_size) for n in kv_lens]
        ids = rand.numpy.permutation(sum(needed) + 2)
        self.tables = np.full((len(kv_lens), max([*needed, 1]) + 1), -1, np.int32)
        k_cache = np.full((len(ids), nkv, block_size, hd), np.nan, np.float32)
        v_cache = k_cache.copy()
        for s, count in enumerate(needed):
            self.tables[s, :count], ids = ids[:count], ids[count:]
            for p in range(kv_lens[s]):
                k_cache[self.tables[s, p // block_size], :, p % block_size] = self.k[s][p]
                v_cache[self.tables[s, p // block_size], :, p % block_size] = self.v[s][p]
        self.k_cache, self.v_cache = tensor(k_cache, dtype), tensor(v_cache, dtype)

    def attend(self, pieces: list[tuple[int, int, int]]) -> list[np.ndarray]:
        """Attention of queries [first, end) of each named sequence, with the cache filled to `end`."""
        q = np.concatenate([self.q[s][first:end] for s, first, end in pieces])
        starts = np.cumsum([0] + [end - first for _, first, end in pieces]).astype(np.int32)
        kv_lens = np.array([end for _, _, end in pieces], np.int32)
        tables = np.stack([self.tables[s] for s, _, _ in pieces])
        out = unwritten((len(q), self.nq * self.hd), self.dtype)
        cuda_ops.paged_attention(
            tensor(q, self.dtype), self.k_cache, self.v_cache, tables, starts, kv_lens, self.scale, out
        )
        return np.split(read(out), starts[1:-1])

    def expected(self, s: int, first: int, end: int) -> np.ndarray:
        out = references.attention(self.q[s][first:end], self.k[s][:end], self.v[s][:end], self.scale, first)
        return out.reshape(end - first, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nq,nkv,hd", [(1, 1, 16), (8, 1, 128), (6, 2, 32), (5, 5, 24), (64, 1, 8)])
def test_paged_attention_matches_numpy_for_a_mixed_batch(rand, nq, nkv, hd, dtype):
    kv_lens = [1, 64, 255, 256, 257, 530]
    cache = Cache(rand, kv_lens, nq, nkv, hd, dtype)
    pieces = [(0, 0, 1), (1, 60, 64), (2, 254, 255), (3, 200, 256), (4, 0, 257), (5, 529, 530)]
    for piece, out in zip(pieces, cache.attend(pieces), strict=True):
        expected = cache.expected(*piece)
        tolerance = max(allowed(dtype, expected), 1e-5)
        assert_close(out, expected, tolerance, f"sequence {piece}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_split_of_a_prompt_gives_the_same_bits(rand, dtype):
    length = 40
    cache = Cache(rand, [length], 4, 2, 16, dtype)
    (whole,) = cache.attend([(0, 0, length)])
    for split in range(1, length):
        (first,) = cache.attend([(0, 0, split)])
        (rest,) = cache.attend([(0, split, length)])
        assert_same_bits(np.concatenate([first, rest]), whole, f"split at {split}")


def test_splits_near_segment_ends_give_the_same_bits(rand):
    length = 600
    cache = Cache(rand, [length], 3, 1, 16)
    (whole,) = cache.attend([(0, 0, length)])
    for split in (1, 63, 64, 255, 256, 257, 300, 511, 512, 513, 599):
        (first,) = cache.attend([(0, 0, split)])
        (rest,) = cache.attend([(0, split, length)])
        assert_same_bits(np.concatenate([first, rest]), whole, f"split at {split}")


def test_decoding_token_by_token_gives_the_bits_of_the_prefill(rand):
    cache = Cache(rand, [300], 8, 2, 32)
    (whole,) = cache.attend([(0, 0, 300)])
    for position in (0, 1, 15, 16, 254, 255, 256, 299):
        (one,) = cache.attend([(0, position, position + 1)])
        assert_same_bits(one[0], whole[position], f"position {position}")


def test_a_sequence_has_the_same_bits_alone_and_among_sixteen_others(rand):
    kv_lens = [int(n) for n in rand.numpy.integers(1, 400, 17)]
    cache = Cache(rand, kv_lens, 4, 2, 16)
    pieces = [(s, max(0, n - int(rand.numpy.integers(1, 60))), n) for s, n in enumerate(kv_lens)]
    together = cache.attend(pieces)
    for piece, out in zip(pieces, together, strict=True):
        (alone,) = cache.attend([piece])
        assert_same_bits(alone, out, f"sequence {piece}")


def test_threads_that_split_a_long_decode_change_no_bit(rand):
    cache = Cache(rand, [2000], 4, 1, 16)
    (inline,) = cache.attend([(0, 1999, 2000)])
    for num_threads in (2, 5):
        cuda_ops.set_num_threads(num_threads)
        try:
            (threaded,) = cache.attend([(0, 1999, 2000)])
        finally:
            cuda_ops.set_num_threads(1)
        assert_same_bits(threaded, inline, f"{num_threads} threads")


def test_a_sequence_without_queries_in_this_step_is_skipped(rand):
    cache = Cache(rand, [5, 9], 2, 1, 16)
    none, some = cache.attend([(0, 5, 5), (1, 7, 9)])
    assert none.shape == (0, 32)
    assert_close(some, cache.expected(1, 7, 9), 1e-5)


def test_no_tokens_at_all_is_fine(rand):
    cache = Cache(rand, [4], 2, 1, 16)
    (out,) = cache.attend([(0, 4, 4)])
    assert out.shape == (0, 32)


def test_a_block_table_that_leaves_the_cache_is_refused(rand):
    cache = Cache(rand, [9], 2, 1, 16)
    cache.tables[0, 2] = 99
    with pytest.raises(ValueError, match="paged_attention: block_tables names a block outside the KV cache"):
        cache.attend([(0, 8, 9)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,hd", [(1, 16), (2, 80), (3, 20)])
def test_segment_attention_keeps_to_its_segments(rand, heads, hd, dtype):
    lengths = [1, 0, 48, 49, 300]
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    qkv = rand.normal(int(starts[-1]), 3, heads, hd)
    out = unwritten((int(starts[-1]), heads * hd), dtype)
    cuda_ops.segment_attention(tensor(qkv, dtype), starts, hd**-0.5, out)
    given = values_of(qkv, dtype)
    for first, end in itertools.pairwise(starts):
        if first == end:
            continue
        part = given[first:end]
        expected = references.attention(part[:, 0], part[:, 1], part[:, 2], hd**-0.5, None)
        expected = expected.reshape(end - first, -1)
        tolerance = max(allowed(dtype, expected), 1e-5)
        assert_close(read(out)[first:end], expected, tolerance, f"segment {first}..{end}")


def test_a_segment_has_the_same_bits_alone_and_packed(rand):
    qkv = rand.normal(350, 3, 2, 16)
    packed, alone = unwritten((350, 32), "float32"), unwritten((290, 32), "float32")
    cuda_ops.segment_attention(qkv, np.array([0, 60, 350], np.int32), 0.25, packed)
    cuda_ops.segment_attention(np.ascontiguousarray(qkv[60:]), np.array([0, 290], np.int32), 0.25, alone)
    assert_same_bits(alone, packed[60:])


def test_large_scores_do_not_overflow(rand):
    cache = Cache(rand, [20], 1, 1, 16)
    cache.q[0] *= 100
    cache.scale = 10.0
    (out,) = cache.attend([(0, 0, 20)])
    assert_close(out, cache.expected(0, 0, 20), 1e-3)

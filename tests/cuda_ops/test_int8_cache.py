"""The int8 KV cache: what is written, and attention over it against the dequantised numbers."""

from __future__ import annotations

import numpy as np
import pytest

import cuda_ops
from tests.checks import assert_close, assert_same_bits
from tests.cuda_ops import references
from tests.cuda_ops.builders import DTYPES, allowed, bf16, read, rounded, tensor, unwritten, values_of
from tests.cuda_ops.test_attention import Cache
from tests.cuda_ops.test_rope import make_cos_sin


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x [..., hd] -> int8 and its scale per row, by the rule of rope_write_kv."""
    scales = rounded(np.abs(x).max(-1) / np.float32(127))
    scales = np.where(scales > 0, scales, np.float32(1))
    steps = x.astype(np.float32) / scales[..., None]
    q = np.clip(np.copysign(np.floor(np.abs(steps) + np.float32(0.5)), steps), -127, 127)
    return q.astype(np.int8), scales


class Int8Cache(Cache):
    """A Cache whose keys and values were made int8; unused slots hold NaN scales."""

    def __init__(self, rand, kv_lens, nq, nkv, hd, dtype="bfloat16"):
        super().__init__(rand, kv_lens, nq, nkv, hd, dtype)
        self.int8 = []
        for cache, rows in ((self.k_cache, self.k), (self.v_cache, self.v)):
            values = read(cache)
            q, scales = quantise(np.nan_to_num(values))
            self.int8.append((q, bf16(np.where(np.isnan(values[..., 0]), np.nan, scales))))
            for s, row in enumerate(rows):
                integers, scale = quantise(row)
                rows[s] = (integers * scale[..., None]).astype(np.float32)

    def attend(self, pieces):
        q = np.concatenate([self.q[s][first:end] for s, first, end in pieces])
        starts = np.cumsum([0] + [end - first for _, first, end in pieces]).astype(np.int32)
        kv_lens = np.array([end for _, _, end in pieces], np.int32)
        tables = np.stack([self.tables[s] for s, _, _ in pieces])
        out = unwritten((len(q), self.nq * self.hd), self.dtype)
        (k, k_scales), (v, v_scales) = self.int8
        cuda_ops.paged_attention(
            tensor(q, self.dtype), k, v, tables, starts, kv_lens, self.scale, out,
            k_scales=k_scales, v_scales=v_scales,
        )  # fmt: skip
        return np.split(read(out), starts[1:-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nq,nkv,hd", [(8, 1, 128), (6, 2, 32), (5, 5, 24)])
def test_attention_matches_numpy_on_the_dequantised_cache(rand, nq, nkv, hd, dtype):
    cache = Int8Cache(rand, [1, 64, 255, 257, 530], nq, nkv, hd, dtype)
    pieces = [(0, 0, 1), (1, 60, 64), (2, 254, 255), (3, 0, 257), (4, 529, 530)]
    for piece, out in zip(pieces, cache.attend(pieces), strict=True):
        expected = cache.expected(*piece)
        assert_close(out, expected, max(allowed(dtype, expected), 1e-5), f"sequence {piece}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_decoding_and_company_change_no_bit(rand, dtype):
    cache = Int8Cache(rand, [300, 70, 9], 4, 2, 32, dtype)
    (whole,) = cache.attend([(0, 0, 300)])
    for split in (1, 63, 255, 256, 257, 299):
        first, second, _ = cache.attend([(0, 0, split), (1, 5, 70), (2, 8, 9)])
        (rest,) = cache.attend([(0, split, 300)])
        assert_same_bits(np.concatenate([first, rest]), whole, f"split at {split}")
        assert_same_bits(second, cache.attend([(1, 5, 70)])[0], "company")


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_are_turned_then_rounded_per_token_and_head(rand, dtype):
    m, nq, nkv, hd, blocks, size = 11, 4, 2, 32, 5, 4
    qkv, cos_sin = rand.normal(m, (nq + 2 * nkv) * hd), make_cos_sin(rand, m, hd)
    qkv[3] = 0
    slots = rand.numpy.permutation(blocks * size)[:m].astype(np.int32)
    k, v = np.full((blocks, nkv, size, hd), 99, np.int8), np.full((blocks, nkv, size, hd), 99, np.int8)
    k_scales, v_scales = (
        unwritten((blocks, nkv, size), "bfloat16"),
        unwritten((blocks, nkv, size), "bfloat16"),
    )
    q_out = unwritten((m, nq, hd), dtype)
    cuda_ops.rope_write_kv(tensor(qkv, dtype), cos_sin, slots, k, v, q_out, k_scales, v_scales)

    given = values_of(qkv, dtype).reshape(m, nq + 2 * nkv, hd)
    by_slot = [array.transpose(0, 2, 1, 3).reshape(-1, nkv, hd) for array in (k, v)]
    scales = [read(array).transpose(0, 2, 1).reshape(-1, nkv) for array in (k_scales, v_scales)]
    integers, expected_scales = quantise(given[:, nq + nkv :])
    assert_same_bits(by_slot[1][slots], integers, "v")
    assert_same_bits(scales[1][slots], expected_scales, "v scales")
    assert (scales[0][slots[3]] == 1).all() and (by_slot[0][slots[3]] == 0).all()
    keys = references.rotate_adjacent(given[:, nq : nq + nkv], cos_sin)
    found = by_slot[0][slots] * scales[0][slots][..., None]
    half_a_step = scales[0][slots][..., None] * (0.5 + 127 * 2.0**-8)  # the largest may be clipped
    assert_close((found - keys) / half_a_step, np.zeros_like(keys), 1.0, "k, in steps")
    untouched = np.setdiff1d(np.arange(blocks * size), slots)
    assert (by_slot[0][untouched] == 99).all() and np.isnan(scales[1][untouched]).all()


def test_scales_come_in_pairs_and_with_int8_caches(rand):
    cache = Int8Cache(rand, [4], 2, 1, 16)
    (k, k_scales), (v, _) = cache.int8
    q, out = tensor(cache.q[0], "bfloat16"), unwritten((4, 32), "bfloat16")
    starts, lens = np.array([0, 4], np.int32), np.array([4], np.int32)
    arguments = (cache.tables, starts, lens, 1.0, out)
    with pytest.raises(ValueError, match="come together"):
        cuda_ops.paged_attention(q, k, v, *arguments, k_scales=k_scales)
    with pytest.raises(ValueError, match=r"k_cache must be .* int8, got .* bfloat16"):
        cuda_ops.paged_attention(q, cache.k_cache, v, *arguments, k_scales=k_scales, v_scales=k_scales)

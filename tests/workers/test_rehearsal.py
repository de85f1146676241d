"""The largest prefill is as large as the limits and the KV cache allow, and uses every pool of experts."""

from __future__ import annotations

import pytest

from workers.gpu_memory import StepLimits
from workers.rehearsal import largest_prefill


@pytest.mark.parametrize(
    ("num_tokens", "num_sequence_tokens", "num_blocks", "expected"),
    [(10, 100, 8, 10), (100, 9, 8, 9), (100, 100, 2, 8)],
    ids=["a step's tokens", "a sequence's tokens", "the cache's slots"],
)
def test_it_has_as_many_tokens_as(num_tokens: int, num_sequence_tokens: int, num_blocks: int, expected: int):
    host = largest_prefill(StepLimits(num_tokens, 4, num_sequence_tokens), num_blocks, 4, 2)
    assert len(host.token_ids) == host.kv_lens[0] == host.query_starts[1] == expected
    assert host.slots.max() < num_blocks * 4
    assert host.block_tables.shape == (1, -(-expected // 4))


@pytest.mark.parametrize(("num_pools", "types"), [(0, {0}), (1, {0}), (2, {0, 1})])
def test_its_tokens_meet_every_pool(num_pools: int, types: set[int]):
    host = largest_prefill(StepLimits(10, 4, 100), 8, 4, num_pools)
    assert set(host.token_types.tolist()) == types

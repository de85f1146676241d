"""How many blocks a CPU rank offers."""

from __future__ import annotations

import pytest

from engine.config import ServerConfig
from engine.errors import ConfigError
from tests.workers.builders import make_tiny_config
from workers.device.paddle import PaddleCpu
from workers.kv_cache import KvCache, block_bytes, blocks_that_fit
from workers.parallel import share_of

MODEL = make_tiny_config()  # 2 * 3 layers * 8 heads * 16 * 4 bytes = 3072 bytes per token
BLOCK = 3072 * 64


def fit(world: int = 1, rank: int = 0, model=MODEL, **config: object) -> int:
    server = ServerConfig(tensor_parallel_size=world, **config)  # type: ignore[arg-type]
    return blocks_that_fit(server, model, share_of(model, rank, world), "float32")


def test_block_holds_keys_and_values_of_all_layers():
    assert block_bytes(MODEL, share_of(MODEL, 0, 1), "float32", 64) == BLOCK
    assert block_bytes(MODEL, share_of(MODEL, 3, 4), "bfloat16", 64) == BLOCK // 8


def test_int8_block_has_a_scale_per_token_and_head():
    share = share_of(MODEL, 0, 1)
    assert block_bytes(MODEL, share, "int8", 64) == BLOCK // 4 + 2 * 3 * 8 * 2 * 64
    one, eight = (
        KvCache.allocate(PaddleCpu(), MODEL, share_of(MODEL, 0, world), "int8", 5, 4) for world in (1, 8)
    )
    for kv, heads in ((one, 8), (eight, 1)):
        shapes = [list(tensor.shape) for tensor in kv.layers[2]]
        assert shapes == [[5, heads, 4, 16]] * 2 + [[5, heads, 4]] * 2
        assert (kv.num_tokens, kv.block_size) == (20, 4)


def test_given_memory_is_shared_by_all_ranks():
    assert fit(kv_cache_memory=100 * BLOCK) == 100
    assert fit(kv_cache_memory=100 * BLOCK, world=8, rank=5) == 100


def test_replicated_kv_heads_count_on_every_rank():
    model = make_tiny_config(num_kv_heads=2)
    assert fit(model=model, kv_cache_memory=100 * BLOCK) == 400
    assert fit(model=model, kv_cache_memory=100 * BLOCK, world=4) == 200


def test_given_memory_below_one_block_is_refused():
    with pytest.raises(ConfigError, match="not even one block"):
        fit(kv_cache_memory=BLOCK - 1)

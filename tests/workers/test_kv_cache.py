"""How many blocks a CPU rank offers."""

from __future__ import annotations

import pytest

from engine.config import ServerConfig
from engine.errors import ConfigError
from tests.workers.builders import make_tiny_config
from workers.kv_cache import DEFAULT_CPU_BYTES, block_bytes, blocks_that_fit
from workers.parallel import share_of

RAM = 24 << 30
MODEL = make_tiny_config()  # 2 * 3 layers * 8 heads * 16 * 4 bytes = 3072 bytes per token
BLOCK = 3072 * 64


def fit(host_bytes: int = RAM, world: int = 1, rank: int = 0, model=MODEL, **config: object) -> int:
    server = ServerConfig(tensor_parallel_size=world, **config)  # type: ignore[arg-type]
    return blocks_that_fit(server, model, share_of(model, rank, world), "float32", host_bytes)


def test_block_holds_keys_and_values_of_all_layers():
    assert block_bytes(MODEL, share_of(MODEL, 0, 1), "float32", 64) == BLOCK
    assert block_bytes(MODEL, share_of(MODEL, 3, 4), "bfloat16", 64) == BLOCK // 8


def test_given_memory_is_shared_by_all_ranks():
    assert fit(kv_cache_memory=100 * BLOCK) == 100
    assert fit(kv_cache_memory=100 * BLOCK, world=8, rank=5) == 100


def test_replicated_kv_heads_count_on_every_rank():
    model = make_tiny_config(num_kv_heads=2)
    assert fit(model=model, kv_cache_memory=100 * BLOCK) == 400
    assert fit(model=model, kv_cache_memory=100 * BLOCK, world=4) == 200


def test_default_is_enough_for_all_sequences_at_full_length():
    assert fit(max_num_seqs=3, max_model_len=100) == 3 * 2


def test_default_stays_under_its_bound():
    blocks = fit(max_num_seqs=100000, max_model_len=4096)
    assert blocks == DEFAULT_CPU_BYTES // BLOCK


def test_default_holds_one_full_sequence_even_beyond_its_bound():
    assert fit(max_model_len=2 << 20) == (2 << 20) // 64


def test_full_length_comes_from_the_model_when_no_flag_says_it():
    assert fit(max_num_seqs=1) == 4096 // 64


def test_sequence_too_long_for_the_machine_is_refused_with_the_flag_to_change():
    with pytest.raises(ConfigError, match=r"6\.0 GiB.*more than half.*8\.0 GiB.*--max-model-len"):
        fit(host_bytes=8 << 30, max_model_len=2 << 20)


def test_given_memory_below_one_block_is_refused():
    with pytest.raises(ConfigError, match="not even one block"):
        fit(kv_cache_memory=BLOCK - 1)

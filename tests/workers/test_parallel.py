"""The shares of a rank: complete, disjoint, and refused in words where a model does not divide."""

from __future__ import annotations

import pytest

from engine.errors import ConfigError
from tests.workers.builders import make_dense_config, make_tiny_config
from workers.parallel import share_of


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_shares_cover_heads_and_vocabulary_without_overlap(world: int):
    config = make_tiny_config()
    shares = [share_of(config, rank, world) for rank in range(world)]
    assert [head for share in shares for head in share.q_heads] == list(range(8))
    assert [head for share in shares for head in share.kv_heads] == list(range(8))
    assert [row for share in shares for row in share.vocab] == list(range(320))
    assert [column for share in shares for column in share.columns(32)] == list(range(32))


def test_neighbouring_ranks_hold_the_same_kv_head_when_there_are_fewer_than_ranks():
    config = make_tiny_config(num_kv_heads=2)
    assert [list(share_of(config, rank, 4).kv_heads) for rank in range(4)] == [[0], [0], [1], [1]]


def test_every_query_head_finds_its_kv_head_on_its_own_rank():
    for num_kv_heads in (1, 2, 4, 8):
        config = make_tiny_config(num_kv_heads=num_kv_heads)
        for world in (1, 2, 4, 8):
            for rank in range(world):
                share = share_of(config, rank, world)
                group = share.num_q_heads // share.num_kv_heads
                held = [share.kv_heads[i // group] for i in range(share.num_q_heads)]
                assert held == [head // (8 // num_kv_heads) for head in share.q_heads]


def test_vocabulary_is_padded_to_whole_shares():
    share = share_of(make_tiny_config(vocab_size=321), 7, 8)
    assert share.padded_vocab_size == 328
    assert share.vocab == range(287, 328)


def test_heads_that_do_not_divide_name_the_sizes_that_do():
    config = make_tiny_config(num_heads=20, num_kv_heads=4)
    with pytest.raises(ConfigError, match=r"8 does not divide.*num_attention_heads = 20.*do: 1, 2, 4"):
        share_of(config, 0, 8)


def test_kv_heads_that_neither_divide_nor_repeat_are_refused():
    with pytest.raises(ConfigError, match="num_key_value_heads = 3"):
        share_of(make_dense_config(num_heads=12, num_kv_heads=3), 0, 4)


def test_expert_width_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"moe_intermediate_size\[1\] = 20"):
        share_of(make_tiny_config(moe_intermediate_sizes=(32, 20)), 0, 8)

"""Blocks that went to host memory and back hold the same bits, and plans that mix them up are noticed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from engine.config import ServerConfig
from engine.errors import EngineError
from engine.messages import Chunk, NewSequence, StepPlan
from tests.conftest import Rand
from tests.workers.builders import make_prompt, make_raw_weights, make_tiny_config
from tests.workers.fake_cuda import FakePaddleGpu, streamed_ops, torch_gpu
from tests.workers.ranks import BLOCK_SIZE, GREEDY, Ranks
from workers.device.base import Device
from workers.device.host import dtype_of
from workers.device.paddle import PaddleCpu
from workers.kv_cache import KvCache, block_bytes
from workers.parallel import share_of
from workers.swap import SwapSpace, host_blocks_that_fit, runs

MODEL = make_tiny_config(num_layers=2)
SHARE = share_of(MODEL, 0, 1)


@pytest.fixture(params=["cpu", "paddle gpu", "torch gpu"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.param == "cpu":
        yield PaddleCpu()
        return
    with streamed_ops():
        yield FakePaddleGpu() if request.param == "paddle gpu" else torch_gpu()()


def make_cache(device: Device, rand: Rand, dtype: str, num_blocks: int) -> tuple[KvCache, list[np.ndarray]]:
    """A cache full of random values, and copies of its tensors' bits."""
    kv = KvCache.allocate(device, MODEL, SHARE, dtype, num_blocks, BLOCK_SIZE)  # type: ignore[arg-type]
    for tensor in tensors_of(kv):
        values = rand.normal(*tensor.shape)
        device.write(tensor, (20 * values).astype(np.int8) if dtype_of(tensor) == "int8" else values)
    return kv, bits_of(device, kv)


def tensors_of(kv: KvCache) -> list:
    return [tensor for layer in kv.layers for tensor in layer]


def bits_of(device: Device, kv: KvCache) -> list[np.ndarray]:
    return [device.host_bits(tensor).copy() for tensor in tensors_of(kv)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_block_comes_back_elsewhere_with_the_same_bits_and_touches_no_other(
    device: Device, rand: Rand, dtype: str
):
    kv, before = make_cache(device, rand, dtype, num_blocks=6)
    space = SwapSpace(device, kv, num_blocks=3)
    assert space.copy([(1, 2), (4, 0)], []).num_blocks == 2
    assert space.copy([], [(2, 5), (0, 3)]).num_blocks == 2
    moved = {5: 1, 3: 4}
    for old, new in zip(before, bits_of(device, kv), strict=True):
        for block in range(6):
            assert np.array_equal(new[block], old[moved.get(block, block)]), f"{rand}: block {block}"


def test_block_that_goes_out_and_is_overwritten_in_one_plan_is_saved_first(device: Device, rand: Rand):
    kv, before = make_cache(device, rand, "float32", num_blocks=3)
    space = SwapSpace(device, kv, num_blocks=2)
    space.copy([(0, 0)], [])
    space.copy([(1, 1)], [(0, 1)])  # place 0 comes into the block that goes to place 1
    space.copy([], [(1, 2)])
    after = bits_of(device, kv)
    assert all(np.array_equal(new[1], old[0]) for new, old in zip(after, before, strict=True)), rand
    assert all(np.array_equal(new[2], old[1]) for new, old in zip(after, before, strict=True)), rand


def test_copies_that_nobody_waits_for_are_told_at_what_they_take(rand: Rand, monkeypatch: pytest.MonkeyPatch):
    """The engine weighs them against computing a block again."""
    with streamed_ops():
        gpu = FakePaddleGpu()
        wait = gpu.synchronize
        monkeypatch.setattr(gpu, "synchronize", lambda: (time.sleep(0.02), wait()))
        kv, _ = make_cache(gpu, rand, "bfloat16", num_blocks=4)
        space = SwapSpace(gpu, kv, num_blocks=3)
        assert space.copy([(0, 0), (2, 1)], [(0, 3)]).seconds >= 3 * 0.02


def test_blocks_side_by_side_on_both_sides_travel_together():
    assert runs([]) == []
    assert runs([(4, 0), (5, 1), (6, 2), (8, 3), (9, 5), (10, 6)]) == [(4, 0, 3), (8, 3, 1), (9, 5, 2)]


def test_given_host_memory_is_shared_by_all_ranks():
    one = block_bytes(MODEL, SHARE, "float32", 64)
    config = ServerConfig(swap_space=10 * one)
    assert host_blocks_that_fit(config, MODEL, SHARE, "float32") == 10
    assert host_blocks_that_fit(config, MODEL, share_of(MODEL, 1, 4), "float32") == 10


# the canary


class CanaryWorld:
    """Ranks that check cached blocks, and one prompt of 16 tokens that lies in blocks 0 to 3."""

    def __init__(self, rand: Rand, folder: Path) -> None:
        config = make_tiny_config(num_layers=1, moe_layers=())
        self.ranks = Ranks(
            config,
            make_raw_weights(config, rand),
            folder,
            num_blocks=16,
            num_host_blocks=4,
            kv_canary=True,
        )
        self.prompt = make_prompt(rand, config, folder, [5, (1, 4, 4), 5])
        self.num_tokens = len(self.prompt.token_ids)
        self.step = 0
        self.run([Chunk(0, self.num_tokens, [0, 1, 2, 3], True)], added=[self.sequence(0)])

    def sequence(self, seq_id: int, num_cached: int = 0, changed: int | None = None) -> NewSequence:
        tokens = list(self.prompt.token_ids)
        if changed is not None:
            tokens[changed] += 1
        return NewSequence(seq_id, tokens, len(tokens), GREEDY, self.prompt.media, num_cached)

    def run(self, chunks: list[Chunk], **plan) -> None:
        self.ranks.run(StepPlan(self.step, chunks, **plan))
        self.step += 1

    def begin_with(self, blocks: list[int], **plan) -> None:
        """A second sequence of the same prompt that takes `blocks` for its beginning."""
        num_cached = BLOCK_SIZE * len(blocks)
        sequence = self.sequence(1, num_cached, plan.pop("changed", None))
        rest = self.num_tokens - num_cached
        self.run([Chunk(1, rest, [*blocks, *range(10, 14)], True)], added=[sequence], **plan)


@pytest.fixture
def canary(rand: Rand, media_folder: Path) -> CanaryWorld:
    return CanaryWorld(rand, media_folder)


def test_canary_is_silent_when_cached_blocks_hold_the_prompt(canary: CanaryWorld):
    canary.begin_with([0, 1, 2])


@pytest.mark.parametrize(
    ("blocks", "wrong"), [([1, 0], 1), ([0, 2], 2), ([0, 1, 3], 3), ([0, 9], 9)], ids=str
)
def test_canary_names_the_block_that_holds_something_else(canary: CanaryWorld, blocks: list[int], wrong: int):
    with pytest.raises(EngineError, match=f"KV block {wrong} was given to sequence 1 as its tokens"):
        canary.begin_with(blocks)


def test_canary_notices_one_token_that_differs(canary: CanaryWorld):
    with pytest.raises(EngineError, match="KV block 0 was given"):
        canary.begin_with([0, 1], changed=2)


def test_canary_notices_another_picture_among_the_same_tokens(canary: CanaryWorld):
    canary.prompt.media[0] = replace(canary.prompt.media[0], content_hash="another")
    with pytest.raises(EngineError, match="KV block 1 was given"):
        canary.begin_with([0, 1])


def test_canary_notices_a_block_that_was_overwritten(canary: CanaryWorld):
    other = canary.sequence(2, changed=0)
    canary.run([Chunk(2, 2, [1], False)], added=[other], dropped=[0])
    with pytest.raises(EngineError, match="KV block 1 was given"):
        canary.begin_with([0, 1])


def test_canary_follows_blocks_through_host_memory(canary: CanaryWorld):
    canary.run([], swap_out=[(1, 3), (0, 2)])
    canary.begin_with([5, 6], swap_in=[(2, 5), (3, 6)])


def test_canary_notices_the_wrong_place_in_host_memory(canary: CanaryWorld):
    canary.run([], swap_out=[(1, 3), (0, 2)])
    with pytest.raises(EngineError, match="KV block 5 was given"):
        canary.begin_with([5, 6], swap_in=[(3, 5), (2, 6)])

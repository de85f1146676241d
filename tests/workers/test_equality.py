"""Design D5: a sequence's tokens and log-probabilities are the same bits whatever happens around it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.messages import Chunk, NewSequence, SamplingParams, StepPlan
from engine.model_config import ModelConfig
from tests.checks import assert_close
from tests.conftest import Rand
from tests.workers.builders import Prompt, RawWeights, make_prompt, make_raw_weights, make_tiny_config
from tests.workers.ranks import BLOCK_SIZE, GREEDY, Driver, Ranks, tokens_of

RANDOM = SamplingParams(
    max_tokens=100, temperature=0.9, top_p=0.9, top_k=50, seed=11, num_logprobs=5, repetition_penalty=1.2
)
MIXED = [3, (1, 4, 6), 2, (4, 2, 4), 2]  # an image of 6 tokens and a video of 4 between text


@dataclass
class World:
    """One model, one set of ranks; every driver starts from an empty mirror with its own block places."""

    rand: Rand
    folder: Path
    config: ModelConfig
    raw: RawWeights
    ranks: Ranks

    def prompt(self, parts: list[Any]) -> Prompt:
        return make_prompt(self.rand, self.config, self.folder, parts)

    def alone(self, prompt: Prompt, count: int, sampling: SamplingParams = GREEDY) -> list[tuple[Any, ...]]:
        """Its output when it runs by itself, the prompt in one chunk."""
        driver = Driver(self.ranks)
        seq_id = driver.add(prompt, sampling)
        driver.generate([seq_id], count)
        bits = driver.bits(seq_id)
        driver.drop(seq_id)
        driver.step({})
        return bits


@pytest.fixture(params=["float32", "bfloat16", "bfloat16 with int8 KV"])
def world(request: pytest.FixtureRequest, rand: Rand, media_folder: Path) -> World:
    dtype, *cache = request.param.split(" with ")
    config = make_tiny_config(dtype=dtype, num_shared_experts=1)
    raw = make_raw_weights(config, rand)
    kv_dtype = "int8" if cache else None
    ranks = Ranks(config, raw, media_folder, num_blocks=512, num_host_blocks=8, kv_dtype=kv_dtype)
    return World(rand, media_folder, config, raw, ranks)


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_output_is_the_same_alone_and_among_sixteen_others(world: World, sampling: SamplingParams):
    prompt = world.prompt(MIXED)
    expected = world.alone(prompt, 6, sampling)

    driver = Driver(world.ranks, seed=1)
    others = [driver.add(world.prompt([2 + i, (1, 2, 2 + 2 * (i % 3)), i + 1]), RANDOM) for i in range(16)]
    driver.generate(others[:8], 2)
    seq_id = driver.add(prompt, sampling)
    driver.generate([*others[:4], seq_id, *others[4:]], 6)
    assert driver.bits(seq_id) == expected, world.rand


def test_output_is_the_same_for_every_split_of_the_prompt(world: World):
    prompt = world.prompt(MIXED)
    expected = world.alone(prompt, 3)
    length = len(prompt.token_ids)
    for first in range(1, length):
        driver = Driver(world.ranks, seed=first)
        seq_id = driver.add(prompt)
        driver.generate([seq_id], 3, chunk_sizes=[first])
        assert driver.bits(seq_id) == expected, f"{world.rand}: split after {first} of {length}"
        driver.drop(seq_id)
        driver.step({})


def test_output_is_the_same_when_every_token_is_a_chunk(world: World):
    prompt = world.prompt(MIXED)
    expected = world.alone(prompt, 4)
    driver = Driver(world.ranks, seed=2)
    seq_id = driver.add(prompt)
    driver.generate([seq_id], 4, chunk_sizes=[1] * (len(prompt.token_ids) - 1))
    assert driver.bits(seq_id) == expected, world.rand


def test_output_is_the_same_when_the_chunks_of_two_sequences_interleave(world: World):
    prompts = [world.prompt([2, (1, 4, 8), 3]), world.prompt([1, (6, 2, 4), 4])]
    expected = [world.alone(prompt, 3, RANDOM) for prompt in prompts]
    driver = Driver(world.ranks, seed=3)
    ids = [driver.add(prompt, RANDOM) for prompt in prompts]
    driver.generate(ids, 3, chunk_sizes=[3, 4, 2])
    assert [driver.bits(seq_id) for seq_id in ids] == expected, world.rand


def test_preempted_sequence_continues_with_the_same_bits(world: World):
    prompt = world.prompt(MIXED)
    expected = world.alone(prompt, 9, RANDOM)
    driver = Driver(world.ranks, seed=4)
    seq_id = driver.add(prompt, RANDOM)
    for count in (2, 3, 4):
        driver.generate([seq_id], count)
        driver.preempt(seq_id)
    assert driver.bits(seq_id) == expected, world.rand


def test_sequence_preempted_inside_an_image_starts_over(world: World):
    prompt = world.prompt([1, (1, 4, 6), 2])
    expected = world.alone(prompt, 2)
    driver = Driver(world.ranks, seed=5)
    seq_id = driver.add(prompt)
    driver.step({seq_id: 5})
    driver.preempt(seq_id)
    driver.generate([seq_id], 2)
    assert driver.bits(seq_id) == expected, world.rand


def test_sequence_continues_from_cached_blocks(world: World):
    """As after a prefix hit: the first tokens are not computed by this sequence."""
    prompt = world.prompt(MIXED)
    driver = Driver(world.ranks, seed=6)
    first = driver.add(prompt)
    driver.generate([first], 4)
    second = driver.add_with_cached_blocks(prompt, source=first, num_blocks=2)
    driver.generate([second], 4)
    assert driver.bits(second) == driver.bits(first), world.rand


def test_sequence_continues_from_blocks_that_were_in_host_memory(world: World):
    """As after a prefix hit in the swap space: out, overwritten, and back into other blocks."""
    prompt = world.prompt(MIXED)
    expected = world.alone(prompt, 1)
    length = len(prompt.token_ids)
    blocks = list(range(-(-length // BLOCK_SIZE)))
    filling, spoiling, going_on = (1 << 40, (1 << 40) + 1, (1 << 40) + 2)  # ids that no driver gives

    def new(seq_id: int, num_cached: int = 0) -> NewSequence:
        return NewSequence(seq_id, prompt.token_ids, length, GREEDY, prompt.media, num_cached)

    run = world.ranks.run
    run(StepPlan(0, [Chunk(filling, length, blocks, False)], [new(filling)]))
    run(StepPlan(1, dropped=[filling], swap_out=[(0, 6), (1, 2)]))
    run(StepPlan(2, [Chunk(spoiling, length, blocks[::-1], False)], [new(spoiling)]))
    rest = Chunk(going_on, length - 2 * BLOCK_SIZE, [100, 101, *blocks[2:]], True)
    plan = StepPlan(3, [rest], [new(going_on, 2 * BLOCK_SIZE)], [spoiling], swap_in=[(6, 100), (2, 101)])
    (token,) = tokens_of(run(plan), plan)
    run(StepPlan(4, dropped=[going_on]))
    assert token.logprobs is not None
    found = (token.token_id, token.logprobs.logprob, *token.logprobs.top_ids, *token.logprobs.top_logprobs)
    assert [found] == expected, world.rand


# ranks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_kv_heads", "size"), [(8, 2), (8, 4), (8, 8), (2, 4)])
def test_any_number_of_ranks_agrees_with_one(rand: Rand, media_folder: Path, num_kv_heads: int, size: int):
    config = make_tiny_config(num_kv_heads=num_kv_heads, num_shared_experts=1, vocab_size=317)
    raw = make_raw_weights(config, rand)
    prompts = [make_prompt(rand, config, media_folder, parts) for parts in (MIXED, [7], [1, (1, 4, 4), 1])]
    one, many = (
        run_all(Driver(Ranks(config, raw, media_folder, world=count)), prompts) for count in (1, size)
    )
    for (tokens, logprobs), (expected_tokens, expected_logprobs) in zip(many, one, strict=True):
        assert tokens == expected_tokens, rand
        assert_close(logprobs, expected_logprobs, 1e-5, f"{rand}, {size} ranks")


def run_all(driver: Driver, prompts: list[Prompt]) -> list[tuple[list[int], np.ndarray]]:
    """Greedy tokens and their log-probabilities, prompts in chunks, all together."""
    ids = [driver.add(prompt) for prompt in prompts]
    driver.step({ids[0]: 5, ids[1]: 7})
    driver.generate(ids, 4)
    return [
        (driver.tokens(seq_id), np.array([t.logprobs.logprob for t in driver.outputs[seq_id] if t.logprobs]))
        for seq_id in ids
    ]

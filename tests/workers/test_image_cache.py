"""Pictures encoded once for all who show them: what is kept, what goes; no bit of an answer changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

import workers.media_features
from engine.errors import EngineError
from engine.messages import Chunk, NewSequence, StepPlan
from engine.model_config import ModelConfig
from tests.conftest import Rand
from tests.workers.builders import (
    Prompt,
    RawWeights,
    make_prompt,
    make_raw_weights,
    make_tiny_config,
    place_weights,
)
from tests.workers.ranks import GREEDY, Driver, Ranks, RankThreads
from workers.device.paddle import PaddleCpu
from workers.image_cache import ImageCache
from workers.media_features import MediaFeatures
from workers.model.ernie_vl import ErnieVl
from workers.sequences import Sequences

PLENTY = 1 << 20
IMAGE = (1, 4, 6)  # 24 patches, 6 tokens
TOKEN_BYTES = 64 * 4  # of make_tiny_config in fp32


# the books ----------------------------------------------------------------------------------------------


def hold(cache: ImageCache, name: str, num_bytes: int = 10, *, keep: bool = True) -> None:
    """Add something that one user needs."""
    cache.make_room(num_bytes)
    cache.add((name, 0), name, num_bytes, keep=keep)
    cache.take((name, 0))


def names(cache: ImageCache, *candidates: str) -> str:
    return "".join(name for name in candidates if (name, 0) in cache)


def test_what_was_used_longest_ago_goes_first():
    cache = ImageCache(budget=30)
    for name in "abc":
        hold(cache, name)
        cache.give_back((name, 0))
    cache.take(("a", 0))
    cache.give_back(("a", 0))
    hold(cache, "d")
    assert names(cache, *"abcd") == "acd"
    cache.recount([("d", 0)])


def test_what_is_in_use_stays_when_the_budget_is_exceeded():
    cache = ImageCache(budget=15)
    hold(cache, "a")
    hold(cache, "b")
    assert names(cache, *"ab") == "ab"
    assert cache.num_bytes == 20
    cache.give_back(("b", 0))
    assert names(cache, *"ab") == "a", "nobody needs b, and both do not fit"
    cache.recount([("a", 0)])


def test_shared_features_stay_until_the_last_user_leaves():
    cache = ImageCache(budget=0)
    hold(cache, "a")
    cache.take(("a", 0))
    cache.give_back(("a", 0))
    assert names(cache, "a") == "a"
    cache.give_back(("a", 0))
    assert len(cache) == cache.num_bytes == 0


def test_what_is_not_worth_keeping_goes_with_its_last_user_and_alone():
    cache = ImageCache(budget=30)
    hold(cache, "a")
    cache.give_back(("a", 0))
    hold(cache, "v", 15, keep=False)
    cache.give_back(("v", 0))
    assert names(cache, *"av") == "a"


def test_recount_notices_a_lost_user():
    cache = ImageCache(budget=30)
    hold(cache, "a")
    with pytest.raises(EngineError, match="users of the image cache"):
        cache.recount([])


# through the runner -------------------------------------------------------------------------------------


class World:
    """A tiny model in fp32 and its prompts."""

    def __init__(self, rand: Rand, folder: Path, **changes: Any) -> None:
        self.rand, self.folder = rand, folder
        self.config: ModelConfig = make_tiny_config(**changes)
        self.raw: RawWeights = make_raw_weights(self.config, rand)

    def driver(self, image_cache: int, world: int = 1) -> Driver:
        ranks = Ranks(self.config, self.raw, self.folder, world=world, image_cache=image_cache)
        return Driver(ranks)

    def prompt(self, parts: list[Any]) -> Prompt:
        return make_prompt(self.rand, self.config, self.folder, parts)

    def again(self, prompt: Prompt, before: int) -> Prompt:
        """The same media behind `before` more text tokens, in files of their own as in another request."""
        media = []
        for item, patches in zip(prompt.media, prompt.patches, strict=True):
            name = f"{item.file}-{self.rand.numpy.integers(2**62):x}"
            patches.tofile(self.folder / name)
            media.append(msgspec.structs.replace(item, file=name, offset=item.offset + before))
        return Prompt([5] * before + prompt.token_ids, media, prompt.patches)


@pytest.fixture
def world(rand: Rand, media_folder: Path) -> World:
    return World(rand, media_folder)


def prefill(driver: Driver, *prompts: Prompt) -> tuple[int, int]:
    """One step for all of the prompts, then they end: encoded and cached patches."""
    ids = [driver.add(prompt) for prompt in prompts]
    result = driver.step({seq_id: len(p.token_ids) for seq_id, p in zip(ids, prompts, strict=True)})
    for seq_id in ids:
        driver.drop(seq_id)
    return result.num_encoded_patches, result.num_cached_patches


@pytest.mark.parametrize(("image_cache", "expected"), [(PLENTY, (0, 24)), (0, (24, 0))])
def test_picture_of_an_earlier_request_is_encoded_again_only_without_a_cache(
    world: World, image_cache: int, expected: tuple[int, int]
):
    driver, prompt = world.driver(image_cache), world.prompt([2, IMAGE, 1])
    assert prefill(driver, prompt) == (24, 0)
    again = world.again(prompt, before=3)
    if image_cache:
        (world.folder / again.media[0].file).unlink()  # nobody needs to read it
    assert prefill(driver, again) == expected


@pytest.mark.parametrize("image_cache", [PLENTY, 0])
def test_picture_that_comes_twice_in_one_step_is_encoded_once(world: World, image_cache: int):
    prompt = world.prompt([2, IMAGE, 1])
    assert prefill(world.driver(image_cache), prompt, world.again(prompt, before=1)) == (24, 24)


def test_picture_that_comes_twice_in_one_prompt_is_encoded_once(world: World):
    one = world.prompt([2, IMAGE, 1])
    two = world.again(one, before=len(one.token_ids))
    both = Prompt(one.token_ids + two.token_ids[-len(one.token_ids) :], [*one.media, *two.media])
    assert prefill(world.driver(0), both) == (24, 24)


def test_picture_counts_as_cached_once_however_many_chunks_touch_it(world: World):
    driver, prompt = world.driver(PLENTY), world.prompt([2, IMAGE, 1])
    prefill(driver, prompt)
    seq_id = driver.add(world.again(prompt, before=1))
    cached = []
    while driver.num_uncomputed(seq_id) > 1:
        cached.append(driver.step({seq_id: 1}).num_cached_patches)
    assert sum(cached) == 24 and len(cached) > 8


def test_preempted_sequence_finds_its_picture(world: World):
    driver = world.driver(PLENTY)
    seq_id = driver.add(world.prompt([2, IMAGE, 1]))
    assert driver.step({seq_id: 5}).num_encoded_patches == 24
    driver.preempt(seq_id)
    result = driver.step({seq_id: driver.num_uncomputed(seq_id)})
    assert (result.num_encoded_patches, result.num_cached_patches) == (0, 24)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_the_same_bits_with_any_budget(rand: Rand, media_folder: Path, dtype: str):
    world = World(rand, media_folder, dtype=dtype, num_shared_experts=1)
    one = world.prompt([3, IMAGE, 2, (4, 2, 4), 2])
    other = world.prompt([1, (1, 2, 2), (6, 4, 4), 2])
    turns = [one, world.again(one, before=4), other, world.again(other, before=1), one]
    outputs = {}
    for image_cache in (0, 6 * TOKEN_BYTES, PLENTY):
        driver = world.driver(image_cache, world=2)
        outputs[image_cache] = []
        for chunk_sizes in ([], [3, 2, 5]):
            ids = [driver.add(prompt) for prompt in turns]
            driver.generate(ids[:3], 3, chunk_sizes=chunk_sizes)
            driver.generate(ids[3:], 3, chunk_sizes=chunk_sizes)
            outputs[image_cache] += [driver.bits(seq_id) for seq_id in ids]
            for seq_id in ids:
                driver.drop(seq_id)
    assert outputs[PLENTY] == outputs[0], rand
    assert outputs[6 * TOKEN_BYTES] == outputs[0], rand


# memory and ranks ---------------------------------------------------------------------------------------


def walk(
    world: World, prompts: list[Prompt], chunk: int, budget: int, num_ranks: int = 1
) -> list[list[tuple[int, int, list[Any]]]]:
    """Per rank, after the encoding of each step: bytes held, bytes in use, and what is held."""

    def on_rank(device: PaddleCpu) -> list[tuple[int, int, list[Any]]]:
        runnable = ErnieVl(world.config, place_weights(world.raw, world.config, device), device, "float32")
        media = MediaFeatures(device, world.config, runnable, "float32", world.folder, budget)
        sequences, seen = Sequences(), []
        for seq_id, prompt in enumerate(prompts):
            new = NewSequence(seq_id, prompt.token_ids, len(prompt.token_ids), GREEDY, prompt.media)
            sequences.apply(StepPlan(0, [], [new]))
            left = len(prompt.token_ids)
            while left:
                chunks = [Chunk(seq_id, min(chunk, left), [], False)]
                media.rows_for(chunks, sequences)
                media.recount()
                used = sum(entry.num_bytes for entry in media.cache._entries.values() if entry.num_users)
                seen.append((media.cache.num_bytes, used, sorted(media.cache._entries)))
                media.release_computed(sequences.finish_chunk(chunks[0]))
                left -= chunks[0].num_tokens
            media.drop(seq_id)
            media.recount()
        return seen

    return RankThreads(num_ranks).run(on_rank)


def test_long_video_holds_no_more_than_the_unit_being_computed(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers.media_features, "PATCHES_PER_UNIT", 32)
    video = world.prompt([1, (60, 4, 4), 1])  # 30 pairs of 4 tokens, one unit each
    unit = 4 * TOKEN_BYTES
    for budget in (0, 10 * unit):
        (seen,) = walk(world, [video], chunk=2, budget=budget)
        assert max(held for held, _, _ in seen) <= unit, f"budget {budget}: a video above it is not kept"


def test_memory_stays_within_the_budget_and_what_is_in_use(world: World):
    prompts = [world.prompt([1, (1, 4, 2 + 2 * (i % 4)), 1]) for i in range(12)]
    prompts.append(world.prompt([1, (1, 12, 12), 1]))  # larger than the budget
    prompts.append(prompts[-2])
    budget = 20 * TOKEN_BYTES
    (seen,) = walk(world, prompts, chunk=3, budget=budget)
    assert all(held <= max(budget, used) for held, used, _ in seen), seen
    assert max(held for held, used, _ in seen if used <= budget) > budget // 2, "the budget is made use of"


def test_all_ranks_hold_the_same(world: World):
    pictures = [world.prompt([1, (1, 4, 4), (1, 2, 2), (6, 4, 4), 1]) for _ in range(3)]
    prompts = [pictures[i] for i in (0, 1, 0, 2, 1, 0)]
    first, *others = walk(world, prompts, chunk=5, budget=24 * TOKEN_BYTES, num_ranks=4)
    assert all(other == first for other in others)


def test_forgetting_one_picture_of_a_pack_frees_its_memory(world: World):
    """Encoded in one call, they must not be slices of one tensor that lives as long as any of them."""
    prompt = world.prompt([1, (1, 4, 4), (1, 4, 4), (1, 2, 2), 1])

    def on_rank(device: PaddleCpu) -> list[bool]:
        runnable = ErnieVl(world.config, place_weights(world.raw, world.config, device), device, "float32")
        media = MediaFeatures(device, world.config, runnable, "float32", world.folder, PLENTY)
        sequences = Sequences()
        new = NewSequence(0, prompt.token_ids, len(prompt.token_ids), GREEDY, prompt.media)
        plan = StepPlan(0, [Chunk(0, len(prompt.token_ids), [0], True)], [new])
        sequences.apply(plan)
        media.rows_for(plan.chunks, sequences)
        features = [media.cache[item.content_hash, 0] for item in prompt.media]
        assert features[0][:2]._is_shared_buffer_with(features[0]), "Paddle tells slices from tensors"
        return [features[0]._is_shared_buffer_with(other) for other in features[1:]]

    (shared,) = RankThreads(1).run(on_rank)
    assert shared == [False, False]

"""No feature of the scheduler changes an answer by a single bit: the real model, every feature on and off.

Each answer of a busy engine, tokens and log-probabilities, is compared with that of an engine that does
nothing clever and serves one request at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from engine.budget import StepBudget
from engine.flight import Flight
from engine.messages import SamplingParams
from engine.model_config import ModelConfig
from engine.sequence import Sequence
from tests.conftest import Rand
from tests.e2e.in_process import Bits, InProcessEngine
from tests.workers.builders import Prompt, RawWeights, make_prompt, make_raw_weights, make_tiny_config

GREEDY = SamplingParams(max_tokens=14, temperature=0.0, num_logprobs=3)
RANDOM = SamplingParams(
    max_tokens=18, temperature=0.9, top_p=0.95, seed=11, num_logprobs=3, repetition_penalty=1.2
)
STOPPING = replace(RANDOM, temperature=1.5, stop_token_ids=tuple(range(3, 50)))  # ends after a few tokens
AGAIN = ", again"
PLAIN: dict[str, Any] = {"enable_prefix_caching": False, "image_cache": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "prefix cache": {"image_cache": 0},
    "image cache": {"enable_prefix_caching": False},
    "small steps": {"max_num_batched_tokens": 9, "max_encoder_tokens_per_step": 5},
    "few blocks": {**PLAIN, "num_blocks": 26},
    "few blocks, prefix cache": {"num_blocks": 26},
    "swap": {"num_blocks": 26, "num_host_blocks": 200},
    "little swap": {"num_blocks": 26, "num_host_blocks": 12},
    "two ranks, swap": {"num_blocks": 26, "num_host_blocks": 200, "tensor_parallel_size": 2},
}


@dataclass
class World:
    """One model, some requests, and what each gets when it is alone."""

    rand: Rand
    folder: Path
    model: ModelConfig
    raw: RawWeights
    requests: dict[str, tuple[Prompt, SamplingParams]]
    alone: dict[int, dict[str, Bits]]  # by number of ranks, as their sums may differ in their last bits

    def engine(self, **options: Any) -> InProcessEngine:
        return InProcessEngine(self.model, self.raw, self.folder, **options)

    def check(self, engine: InProcessEngine) -> None:
        for name in engine.outputs:
            expected = self.alone[engine.config.tensor_parallel_size][name.removesuffix(AGAIN)]
            actual = engine.bits(name)
            first = next((i for i, pair in enumerate(zip(actual, expected)) if pair[0] != pair[1]), None)  # noqa: B905
            assert actual == expected, (
                f"{self.rand}: answer {name!r} differs from token {first} on: "
                f"{actual[first or 0 :][:1]}, alone {expected[first or 0 :][:1]}"
            )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    rand, folder = Rand(5), tmp_path_factory.mktemp("media")
    model = make_tiny_config(num_layers=2, moe_layers=(1,), num_shared_experts=1)
    raw = make_raw_weights(model, rand)
    requests = make_requests(rand, model, folder)
    world = World(rand, folder, model, raw, requests, {})
    for num_ranks in (1, 2):
        plain = world.engine(**PLAIN, tensor_parallel_size=num_ranks)
        for name, (prompt, sampling) in requests.items():
            plain.ask(name, prompt, sampling)
            plain.run_until_idle()
        world.alone[num_ranks] = {name: plain.bits(name) for name in requests}
    lengths = [len(bits) for bits in world.alone[1].values()]
    assert min(lengths) < 10 < max(lengths), f"some have to stop early: {lengths}"
    return world


def make_requests(rand: Rand, model: ModelConfig, folder: Path) -> dict[str, tuple[Prompt, SamplingParams]]:
    """Prompts that begin alike, with text or a picture; a video; one that is another's next turn."""

    def prompt(*parts: Any) -> Prompt:
        return make_prompt(rand, model, folder, list(parts))

    def joined(first: Prompt, second: Prompt) -> Prompt:
        assert not second.media
        return Prompt(first.token_ids + second.token_ids, first.media, first.patches)

    story, picture = prompt(22), prompt(3, (1, 4, 6), 5, (1, 6, 6), 2)
    return {
        "story": (joined(story, prompt(9)), RANDOM),
        "story again": (joined(story, prompt(4)), replace(GREEDY, max_tokens=30)),
        "story, stopping": (joined(story, prompt(7)), STOPPING),
        "pictures": (joined(picture, prompt(2)), RANDOM),
        "pictures again": (joined(picture, prompt(8)), replace(STOPPING, seed=4)),
        "clip": (prompt(2, (6, 4, 4), 3, (1, 2, 2), 1), GREEDY),
        "one token": (prompt(5), replace(GREEDY, max_tokens=1)),
        "short": (prompt(3), replace(STOPPING, seed=9)),
        "next turn": (joined(story, prompt(40)), replace(STOPPING, seed=2)),
    }


def play(world: World, engine: InProcessEngine) -> None:
    """Requests come a step after each other, and all of them once more."""
    for suffix in ("", AGAIN):
        for name, (prompt, sampling) in world.requests.items():
            engine.ask(name + suffix, prompt, sampling)
            engine.step()
    engine.run_until_idle()
    assert len(engine.outputs) == 2 * len(world.requests)


def preempt_always(engine: InProcessEngine) -> None:
    """In every step everyone but the oldest gives its blocks back, if it has made a token with them."""
    planner, live = engine.scheduler._planner, engine.scheduler._live
    continue_running = planner._continue_running

    def preempt_first(filling: list[Sequence], flight: Flight, budget: StepBudget) -> None:
        for sequence in live.running[1:]:
            if not sequence.must_advance:
                live.preempt(sequence, flight, "older")
        continue_running([one for one in filling if one.is_running], flight, budget)

    planner._continue_running = preempt_first  # type: ignore[method-assign]


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_are_those_of_requests_served_alone(world: World, variant: str, overlap: bool):
    engine = world.engine(overlap=overlap, **VARIANTS[variant])
    play(world, engine)
    world.check(engine)
    if "num_blocks" in VARIANTS[variant]:
        assert engine.scheduler.num_preemptions > 0
    if "num_host_blocks" in VARIANTS[variant]:
        assert engine.scheduler.kv.swap.num_returned > 0


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("variant", ["plain", "prefix cache", "image cache", "small steps", "swap"])
def test_answers_survive_preemption_at_every_step(world: World, variant: str, overlap: bool):
    engine = world.engine(overlap=overlap, **VARIANTS[variant])
    preempt_always(engine)
    play(world, engine)
    world.check(engine)
    assert engine.scheduler.num_preemptions > 30, engine.scheduler.num_preemptions


def test_overlap_saves_no_step_and_wastes_at_most_one_slot_per_sequence(world: World):
    """A stop token is noticed one step late; lengths are known ahead and cost nothing."""
    engines = [world.engine(overlap=overlap, **PLAIN) for overlap in (False, True)]
    for engine in engines:
        for name, (prompt, sampling) in world.requests.items():
            engine.ask(name, prompt, sampling)
        engine.run_until_idle()
    plain, overlapped = (engine.num_steps for engine in engines)
    assert overlapped <= plain + 2, (plain, overlapped)


def test_pictures_are_encoded_once_with_the_image_cache_and_each_time_without(world: World):
    counts = {}
    for name in ("plain", "image cache"):
        engine = world.engine(overlap=True, **VARIANTS[name])
        play(world, engine)
        counts[name] = engine.num_encoded_patches
    assert counts["image cache"] < counts["plain"], counts

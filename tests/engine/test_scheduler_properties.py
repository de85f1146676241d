"""Whatever arrives in whatever order: no step fails, the books are right, every request gets its own output.

The ranks are played by fakes.RankMirror, which writes the whole history of a token into its slot and reads
all slots of a sequence back at every step: a block shared wrongly, overwritten too early or trusted before it
was computed is found at once. Two drivers: Hypothesis, which shrinks what it finds, and plain dice for the
number of steps; both play the same `Game`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from engine.messages import MediaItem
from tests.conftest import Rand
from tests.engine.builders import SchedulerWorld, make_scheduler

NUM_STEPS = int(os.environ.get("OCTET_PROPERTY_STEPS") or 100_000)
STEPS_PER_GAME = 400
VOCAB_SIZES = (40, 10_000)  # with 40 the end token turns up by chance
BEGINNINGS = [[token] * 9 + [token + 1] * 14 for token in (5, 11, 17)]  # what prompts have in common


@dataclass
class Asked:
    prompt: list[int]
    max_tokens: int
    media: list[MediaItem]
    may_end_early: bool = False  # aborted, or has a deadline


class Game:
    """One scheduler with a history of requests; every move is followed by a recount."""

    def __init__(self, vocab_size: int, overlap: bool, **config) -> None:
        self.vocab_size = vocab_size
        self.world = make_scheduler(vocab_size=vocab_size, max_model_len=64, block_size=4, **config)
        self.world.overlap = overlap
        self.asked: dict[str, Asked] = {}
        self.num_steps = 0
        self.num_cached_tokens = 0

    def ask(self, prompt: list[int], max_tokens: int, media: list[MediaItem], **changes) -> None:
        asked = Asked(prompt, max_tokens, media, may_end_early="timeout" in changes)
        request = self.world.add(prompt=prompt, max_tokens=max_tokens, media=media, **changes)
        self.asked[request] = asked
        self.world.recount()

    def ask_next_turn(self, index: int) -> None:
        """Go on where an earlier request stands, as a chat does."""
        if self.asked:
            request = list(self.asked)[index % len(self.asked)]
            before = self.asked[request]
            prompt = [*before.prompt, *self.world.tokens(request), 7, 8][:50]
            if all(item.offset + item.num_tokens <= len(prompt) for item in before.media):
                self.ask(prompt, 5, before.media)

    def step(self) -> None:
        self.num_steps += bool(self.world.step())
        self.world.recount()

    def abort(self, index: int, in_flight: bool) -> None:
        plan = self.world.plan() if in_flight else None
        if self.asked:
            request = list(self.asked)[index % len(self.asked)]
            self.asked[request].may_end_early = True
            self.world.abort(request)
            self.world.recount()
        if plan:
            self.num_steps += 1
            self.world.run(plan)
            self.world.recount()

    def finish(self) -> None:
        """Everything ends, nothing is left, and each output is that of the same request alone."""
        num_tokens = sum(len(asked.prompt) + asked.max_tokens for asked in self.asked.values())
        self.num_steps += self.world.run_until_idle(max_steps=100 + 4 * num_tokens)  # some are computed again
        self.world.assert_empty()
        alone = make_scheduler(vocab_size=self.vocab_size, enable_prefix_caching=False, max_model_len=64)
        for request, asked in self.asked.items():
            self._check_outputs(request, asked, alone)

    def _check_outputs(self, request: str, asked: Asked, alone: SchedulerWorld) -> None:
        endings = [output.finish_reason for output in self.world.outputs[request] if output.finish_reason]
        assert len(endings) == 1 and self.world.last(request).finish_reason, f"{request} ended as {endings}"
        twin = alone.add(prompt=asked.prompt, max_tokens=asked.max_tokens, media=asked.media)
        alone.run_until_idle()
        expected, actual = alone.tokens(twin), self.world.tokens(request)
        if asked.may_end_early:
            expected = expected[: len(actual)]
        else:
            assert endings == [alone.last(twin).finish_reason], self.world.last(request)
        assert actual == expected, f"{request} differs from the same request alone"
        self.num_cached_tokens += self.world.outputs[request][0].num_cached_tokens


def picture(name: str, offset: int, kind: str = "image") -> MediaItem:
    return MediaItem(kind, name, (2, 4, 4), offset, 5, "file")  # type: ignore[arg-type]


def make_prompt(beginning: int, kept: int, rest: list[int]) -> list[int]:
    return BEGINNINGS[beginning][:kept] + rest


# ---------------------------------------------------------------------------------- Hypothesis


tokens = st.lists(st.integers(3, 39), min_size=1, max_size=24)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(16, 64),
        vocab_size=st.sampled_from(VOCAB_SIZES),
        overlap=st.booleans(),
        max_num_seqs=st.integers(1, 8),
        max_num_batched_tokens=st.sampled_from([1, 3, 8, 64]),
        max_encoder_tokens_per_step=st.sampled_from([1, 6, 100]),
        max_prefill_tokens_per_step=st.sampled_from([0, 2, 7]),
        enable_prefix_caching=st.booleans(),
        num_host_blocks=st.sampled_from([0, 1, 7, 40]),
    )
    def begin(self, vocab_size: int, overlap: bool, **config) -> None:
        self.game = Game(vocab_size, overlap, **config)

    @rule(
        beginning=st.integers(0, 2),
        kept=st.integers(0, 23),
        rest=tokens,
        max_tokens=st.integers(1, 16),
        pictures=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["image", "video"])), max_size=2),
        priority=st.sampled_from([0, 0, 0, -1, 3]),
        tenant=st.sampled_from(["", "one", "two"]),
        cache_salt=st.sampled_from(["", "", "salt"]),
    )
    def ask(self, beginning, kept, rest, max_tokens, pictures, **changes) -> None:
        prompt = make_prompt(beginning, kept, rest)
        media = [picture(name, 1 + 6 * place, kind) for place, (name, kind) in enumerate(pictures)]
        media = [item for item in media if item.offset + item.num_tokens <= len(prompt)]
        self.game.ask(prompt, max_tokens, media, **changes)

    @rule(rest=tokens, timeout=st.floats(0.5, 20.0))
    def ask_with_deadline(self, rest, timeout) -> None:
        self.game.ask(rest, 16, [], timeout=timeout)

    @rule(index=st.integers(0, 99))
    def ask_next_turn(self, index) -> None:
        self.game.ask_next_turn(index)

    @rule(count=st.integers(1, 6))
    def step(self, count) -> None:
        for _ in range(count):
            self.game.step()

    @rule(overlap=st.booleans())
    def change_overlap(self, overlap) -> None:
        self.game.world.overlap = overlap

    @rule(index=st.integers(0, 99), in_flight=st.booleans())
    def abort(self, index, in_flight) -> None:
        self.game.abort(index, in_flight)

    def teardown(self) -> None:
        if hasattr(self, "game"):
            self.game.finish()


TestWhatHypothesisTries = SchedulerMachine.TestCase
TestWhatHypothesisTries.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


# ---------------------------------------------------------------------------------- dice


def test_any_of_100_000_steps_leaves_the_books_right_and_every_output_its_own(rand: Rand) -> None:
    num_steps = num_cached = num_preempted = num_swapped = 0
    while num_steps < NUM_STEPS:
        game = throw_dice(rand)
        game.finish()
        num_steps += game.num_steps
        num_cached += game.num_cached_tokens
        num_preempted += game.world.scheduler.num_preemptions
        num_swapped += game.world.scheduler.kv.swap.num_returned
    assert num_cached > num_steps / 20 and num_preempted > num_steps / 400, (num_cached, num_preempted)
    assert num_swapped > num_steps / 100, num_swapped


def throw_dice(rand: Rand) -> Game:
    dice = rand.python
    game = Game(
        dice.choice(VOCAB_SIZES),
        overlap=dice.random() < 0.6,
        num_blocks=dice.choice([16, 18, 24, 60]),
        max_num_seqs=dice.choice([2, 5, 8]),
        max_num_batched_tokens=dice.choice([1, 5, 16, 64]),
        max_encoder_tokens_per_step=dice.choice([1, 6, 100]),
        max_prefill_tokens_per_step=dice.choice([0, 2, 7]),
        enable_prefix_caching=dice.random() < 0.8,
        num_host_blocks=dice.choice([0, 2, 16, 60]),
    )
    busy = dice.choice([0.1, 0.2, 0.4])
    for _ in range(STEPS_PER_GAME):
        if dice.random() < busy:
            ask_at_random(game, rand)
        if dice.random() < 0.02:
            game.abort(dice.randrange(99), in_flight=dice.random() < 0.5)
        game.step()
    return game


def ask_at_random(game: Game, rand: Rand) -> None:
    dice = rand.python
    if dice.random() < 0.2:
        game.ask_next_turn(dice.randrange(99))
        return
    prompt = make_prompt(
        dice.randrange(3), dice.randrange(24), dice.choices(range(3, 40), k=dice.randint(1, 24))
    )
    media = [picture(dice.choice("ab"), 1 + 6 * place) for place in range(dice.choice([0, 0, 1, 2]))]
    media = [item for item in media if item.offset + item.num_tokens <= len(prompt)]
    changes = {"timeout": dice.uniform(0.5, 30.0)} if dice.random() < 0.05 else {}
    game.ask(
        prompt,
        dice.choice([1, 4, 16, 40]),
        media,
        priority=dice.choice([0, 0, 0, -1, 3]),
        tenant=dice.choice(["", "one", "two"]),
        cache_salt=dice.choice(["", "", "", "salt"]),
        **changes,
    )

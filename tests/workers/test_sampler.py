"""What a request's sampling parameters do to its tokens, through a whole step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.messages import SamplingParams
from engine.model_config import ModelConfig
from tests.conftest import Rand
from tests.workers.builders import Prompt, RawWeights, make_dense_config, make_prompt, make_raw_weights
from tests.workers.ranks import Driver, Ranks, SampledToken

GREEDY = SamplingParams(max_tokens=100, temperature=0.0)


class Model:
    """A small text model and one prompt."""

    def __init__(self, rand: Rand, folder: Path) -> None:
        self.config: ModelConfig = make_dense_config(num_layers=1)
        self.raw: RawWeights = make_raw_weights(self.config, rand)
        self.prompt: Prompt = make_prompt(rand, self.config, folder, [6])
        self.folder = folder

    def outputs(
        self, count: int, *sampling: SamplingParams, eos: tuple[int, ...] = (), **runner_options: Any
    ) -> list[list[SampledToken]]:
        """`count` tokens of the prompt for each of `sampling`, in one batch."""
        config = msgspec.structs.replace(self.config, eos_token_ids=eos)
        driver = Driver(Ranks(config, self.raw, self.folder, **runner_options))
        ids = [driver.add(self.prompt, params) for params in sampling]
        driver.generate(ids, count)
        return [driver.outputs[seq_id] for seq_id in ids]

    def tokens(self, count: int, *sampling: SamplingParams, **options: Any) -> list[list[int]]:
        return [[token.token_id for token in one] for one in self.outputs(count, *sampling, **options)]


@pytest.fixture
def model(rand: Rand, media_folder: Path) -> Model:
    return Model(rand, media_folder)


def with_changes(**changes: Any) -> SamplingParams:
    return msgspec.structs.replace(GREEDY, **changes)


def test_end_token_is_banned_before_min_tokens_and_free_afterwards(model: Model):
    ((end, *_),) = model.tokens(1, GREEDY)
    free, banned, past = model.tokens(
        1, GREEDY, with_changes(min_tokens=1), with_changes(min_tokens=0), eos=(end,)
    )
    assert free == past == [end]
    assert banned != [end]


def test_stop_token_is_banned_before_min_tokens_too(model: Model):
    ((stop, *_),) = model.tokens(1, GREEDY)
    ((token, *_),) = model.tokens(1, with_changes(min_tokens=1, stop_token_ids=(stop,)))
    assert token != stop


def test_end_token_that_does_not_end_is_not_banned(model: Model):
    ((end, *_),) = model.tokens(1, GREEDY)
    assert model.tokens(1, with_changes(min_tokens=1, ignore_eos=True), eos=(end,)) == [[end]]


def test_seed_decides_the_noise(model: Model):
    first, again, other = model.tokens(
        12, *(with_changes(temperature=3.0, seed=seed) for seed in (5, 5, 2**63 + 5))
    )
    assert first == again
    assert first != other


def test_presence_penalty_forbids_repetition_when_it_is_large(model: Model):
    (tokens,) = model.tokens(30, with_changes(presence_penalty=1000.0))
    assert len(set(tokens)) == 30


def test_repetition_penalty_counts_the_prompt(model: Model):
    (tokens,) = model.tokens(20, with_changes(repetition_penalty=1e6, presence_penalty=1000.0))
    assert not set(tokens) & set(model.prompt.token_ids)


def test_each_row_gets_as_many_logprobs_as_it_asked_for(model: Model):
    rows = model.outputs(1, *(with_changes(num_logprobs=count) for count in (-1, 0, 3)))
    (none,), (chosen,), (top,) = rows
    assert none.logprobs is None
    assert chosen.logprobs is not None and top.logprobs is not None
    assert (chosen.logprobs.top_ids, chosen.logprobs.top_logprobs) == ([], [])
    assert len(top.logprobs.top_ids) == 3 and top.logprobs.top_ids[0] == top.token_id
    assert top.logprobs.logprob == top.logprobs.top_logprobs[0] == chosen.logprobs.logprob < 0


def test_rows_beyond_the_tokenizer_are_never_sampled(model: Model):
    (tokens,) = model.tokens(50, with_changes(temperature=100.0), num_token_ids=7)
    assert set(tokens) <= set(range(7))

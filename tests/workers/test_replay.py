"""Steps that look alike are replayed on a CPU: fewer calls of the model, the same bits."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import cuda_ops
from cuda_ops.library import library
from engine.messages import SamplingParams
from tests.conftest import Rand
from tests.workers.builders import make_prompt, make_raw_weights, make_tiny_config
from tests.workers.ranks import Driver, Ranks
from workers.model.decoder import Decoder
from workers.recording import Recording

IMAGE = (1, 4, 6)  # 6 tokens


@pytest.fixture
def ranks(rand: Rand, media_folder: Path) -> Ranks:
    config = make_tiny_config(dtype="bfloat16", num_shared_experts=1)
    return Ranks(config, make_raw_weights(config, rand), media_folder, num_blocks=64, block_size=16)


def computed_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of tokens of each step that the decoder computes itself."""
    steps: list[int] = []
    compute = Decoder.run

    def run(self, batch, media, kv):
        steps.append(batch.num_tokens)
        return compute(self, batch, media, kv)

    monkeypatch.setattr(Decoder, "run", run)
    return steps


def test_the_third_step_of_a_shape_does_without_the_decoder(ranks, rand, media_folder, monkeypatch):
    steps = computed_steps(monkeypatch)
    driver = Driver(ranks)
    seq_id = driver.add(make_prompt(rand, make_tiny_config(), media_folder, [7]))
    driver.generate([seq_id], 8)  # one block: the prompt, then seven tokens of the same shape
    assert steps == [7, 1, 1]


def test_a_sequence_that_comes_makes_an_end_of_the_replay(ranks, rand, media_folder, monkeypatch):
    steps = computed_steps(monkeypatch)
    driver = Driver(ranks)
    first, second = (driver.add(make_prompt(rand, make_tiny_config(), media_folder, [3])) for _ in range(2))
    driver.generate([first], 5)
    driver.generate([second], 1)
    driver.generate([first], 2)
    assert steps == [3, 1, 1, 3, 1, 1]


def test_replayed_steps_have_the_bits_of_computed_ones(ranks, rand, media_folder, monkeypatch):
    prompts = [make_prompt(rand, make_tiny_config(), media_folder, [3, IMAGE, 2]) for _ in range(3)]

    def answers() -> list:
        driver = Driver(ranks)
        seq_ids = [driver.add(prompt) for prompt in prompts]
        driver.generate(seq_ids[:2], 9)
        driver.generate(seq_ids, 12)  # one with an image comes, and all of them pass the end of a block
        chunked = driver.add(prompts[0])  # every chunk has other rows of the image
        driver.generate([chunked], 3, [2] * 5)
        return [driver.bits(seq_id) for seq_id in (*seq_ids, chunked)]

    replayed = answers()
    monkeypatch.setattr(Recording, "run", lambda self, given, work: work())
    assert replayed == answers()


def test_calls_of_other_threads_are_not_recorded(rand):
    mine, others = (np.ones((1, 8), np.float32) for _ in range(2))
    cuda_ops.add(mine, mine)

    def work() -> None:
        cuda_ops.add(mine, mine)
        other = threading.Thread(target=cuda_ops.add, args=(others, others))
        other.start()
        other.join()

    make_again = library.record(work)
    assert (mine == 4).all() and (others == 2).all()
    cuda_ops.add(mine, mine)
    assert (mine == 8).all()
    make_again()
    assert (mine == 16).all(), "recording had ended: the addition behind it is not made again"
    assert (others == 2).all()


def test_an_error_of_a_recorded_call_comes_out_of_its_replay():
    source, rows, out = np.ones((1, 8), np.float32), np.zeros(1, np.int32), np.zeros((4, 8), np.float32)
    cuda_ops.scatter_rows(source, rows, out)
    make_again = library.record(lambda: cuda_ops.scatter_rows(source, rows, out))
    rows[0] = 4
    with pytest.raises(ValueError, match="rows must lie inside out"):
        make_again()


def test_sampling_by_seed_goes_on_from_token_to_token_when_it_is_replayed(
    ranks, rand, media_folder, monkeypatch
):
    prompt = make_prompt(rand, make_tiny_config(), media_folder, [5])
    sampling = SamplingParams(max_tokens=64, temperature=5.0, seed=3)

    def answer() -> list[int]:
        driver = Driver(ranks)
        seq_id = driver.add(prompt, sampling)
        driver.generate([seq_id], 10)
        return driver.tokens(seq_id)

    replayed = answer()
    assert len(set(replayed)) > 3, "hot enough for tokens to differ"
    monkeypatch.setattr(Recording, "run", lambda self, given, work: work())
    assert replayed == answer()


def test_the_third_sampling_of_the_same_rows_is_replayed(ranks, rand, media_folder, monkeypatch):
    calls, sample = [], cuda_ops.sample_tokens
    monkeypatch.setattr(cuda_ops, "sample_tokens", lambda *given: (calls.append(1), sample(*given)))
    driver = Driver(ranks)
    seq_id = driver.add(make_prompt(rand, make_tiny_config(), media_folder, [7]))
    driver.generate([seq_id], 8)
    assert len(calls) == 2 and len(driver.tokens(seq_id)) == 8

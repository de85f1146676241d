"""Rank processes on fake GPUs over real sockets: load, handshake, two plans at once, failure."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from engine.config import ServerConfig
from engine.messages import (
    Chunk,
    NewSequence,
    RankFailed,
    RankHello,
    RankLoaded,
    RankReady,
    SamplingParams,
    StartServing,
    StepPlan,
    StepResult,
    StopServing,
)
from models.tiny import write_tiny_checkpoint
from tests.checks import assert_close
from tests.workers.engine_side import EngineSide, open_engine_side

SAMPLING = SamplingParams(max_tokens=10, temperature=0.0, num_logprobs=2)
PROMPT = [3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> ServerConfig:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint(folder, preset="golden")
    return ServerConfig(
        model=str(folder),
        device="gpu",
        dtype="bfloat16",
        quantization="wint8",
        max_model_len=256,
        max_num_seqs=1,
        config_overrides={"num_hidden_layers": 2},
        max_num_batched_tokens=64,
        kv_cache_memory=1 << 22,
        weight_cache=str(folder / "cache"),
        rank_timeout=60.0,
    )


def start(engine: EngineSide) -> list[RankLoaded]:
    engine.start_ranks("tests.workers.fake_gpu_rank")
    engine.receive_all(RankHello)
    loaded = engine.receive_all(RankLoaded)
    engine.send(StartServing(num_blocks=8))
    engine.receive_all(RankReady)
    return loaded


def answer(engine: EngineSide) -> list[tuple[int, float]]:
    """Three tokens after the prompt; each plan is sent before the one before it is answered."""
    plans = [
        StepPlan(0, [Chunk(5, 5, [2], True)], [NewSequence(5, PROMPT, 5, SAMPLING)]),
        StepPlan(1, decoding=np.array([5], np.int64).tobytes()),
        StepPlan(2, decoding=np.array([5], np.int64).tobytes()),
    ]
    tokens: list[tuple[int, float]] = []
    for plan in plans[:2]:
        engine.send(plan)
    for plan in (plans[2], None, None):
        result = engine.receive(StepResult)
        (token_id,) = np.frombuffer(result.token_ids, np.int32).tolist()
        assert result.logprobs[0].top_ids[0] == token_id
        tokens.append((token_id, result.logprobs[0].logprob))
        if plan is not None:
            engine.send(plan)
    return tokens


@pytest.fixture(scope="module")
def first_answer(checkpoint: ServerConfig) -> list[tuple[int, float]]:
    """Of a rank that loads the checkpoint, fills the weight cache and leaves when it is told to."""
    with open_engine_side(checkpoint) as engine:
        (loaded,) = start(engine)
        assert loaded.device == "gpu:0 Fake H800" and loaded.weight_bytes > 1_000_000
        tokens = answer(engine)
        probe = engine.run_step(StepPlan(3, dropped=[5]))
        assert (probe.step, probe.token_ids) == (3, b"")
        engine.send(StopServing())
        assert engine.exit_codes() == [0]
    return tokens


def test_rank_answers_overlapping_plans_the_same_from_cached_weights(
    checkpoint: ServerConfig, first_answer: list[tuple[int, float]]
):
    with open_engine_side(checkpoint) as engine:
        start(engine)
        assert answer(engine) == first_answer
        engine.send(StepPlan(7, [Chunk(99, 1, [0], True)]))
        failed = engine.receive(RankFailed)
        assert (failed.step, failed.message) == (7, "the plan names sequence 99, which was never added")
        assert engine.exit_codes() == [1]


def test_two_ranks_sum_through_memory_that_they_map_from_each_other(
    checkpoint: ServerConfig, first_answer: list[tuple[int, float]]
):
    pair = msgspec.structs.replace(checkpoint, tensor_parallel_size=2, weight_cache="off")
    with open_engine_side(pair) as engine:
        loaded = start(engine)
        assert [rank.device for rank in loaded] == ["gpu:0 Fake H800", "gpu:1 Fake H800"]
        (_, logprob), *_ = answer(engine)
        assert_close(np.float32(logprob), np.float32(first_answer[0][1]), 0.05)
        engine.send(StopServing())
        assert engine.exit_codes() == [0, 0]

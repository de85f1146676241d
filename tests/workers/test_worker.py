"""Real worker processes over real sockets: handshake, steps, failure, exit."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from array import array

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
from engine.status_page import Phase
from models.tiny import write_tiny_checkpoint
from models.tiny_config import golden_model
from tests.workers.engine_side import ROOT, EngineSide, open_engine_side, running_ranks

GOLDEN = golden_model()
BLOCK_BYTES = 2 * GOLDEN.num_layers * GOLDEN.num_kv_heads * GOLDEN.head_dim * 4 * 64  # fp32, 64 tokens
INT8_MORE = GOLDEN.head_dim * 4 / (GOLDEN.head_dim + 2)  # so many times the blocks
SAMPLING = SamplingParams(max_tokens=10, temperature=0.0, num_logprobs=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> ServerConfig:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint(folder, preset="golden")
    return ServerConfig(
        model=str(folder), max_model_len=256, max_num_seqs=4, cpu_threads=1, kv_cache_memory=16 * BLOCK_BYTES
    )


def start_serving(engine: EngineSide) -> None:
    engine.receive_all(RankHello)
    engine.receive_all(RankLoaded)
    engine.send(StartServing(num_blocks=8))
    engine.receive_all(RankReady)


@pytest.mark.parametrize(("kv_cache_dtype", "more"), [("auto", 1.0), ("int8", INT8_MORE)])
def test_two_ranks_shake_hands_serve_steps_and_leave(
    checkpoint: ServerConfig, kv_cache_dtype: str, more: float
):
    settings = {"swap_space": 4 * BLOCK_BYTES, "kv_cache_dtype": kv_cache_dtype}
    with running_ranks(checkpoint, tensor_parallel_size=2, **settings) as engine:
        hellos = engine.receive_all(RankHello)
        assert [(hello.rank, hello.pid) for hello in hellos] == list(
            enumerate(p.pid for p in engine.processes)
        )
        loaded = engine.receive_all(RankLoaded)
        blocks = int(16 * more), int(4 * more)
        assert [(rank.max_blocks, rank.max_host_blocks) for rank in loaded] == [blocks, blocks]
        assert loaded[0].weight_bytes == loaded[1].weight_bytes > 1_000_000
        assert loaded[0].device == "cpu"
        engine.send(StartServing(num_blocks=8, num_host_blocks=4))
        engine.receive_all(RankReady)

        new = NewSequence(5, [3, 4, 5, 6, 7], 5, SAMPLING)
        assert engine.run_step(StepPlan(0, [Chunk(5, 3, [2], False)], [new])).num_tokens == 0
        first = engine.run_step(StepPlan(1, [Chunk(5, 2, [], True)]))
        decoding = array("q", [5]).tobytes()
        second = engine.run_step(StepPlan(2, decoding=decoding, swap_out=[(2, 3)], swap_in=[(3, 7)]))
        assert first.num_tokens == second.num_tokens == 1
        assert second.num_swapped_blocks == 2
        assert first.logprobs[0].top_ids[0] == array("i", first.token_ids)[0]

        for process in engine.processes:
            process.send_signal(signal.SIGINT)  # the terminal sends it to everybody; ranks leave it alone
        probe = engine.run_step(StepPlan(3, dropped=[5]))
        assert (probe.step, probe.num_tokens) == (3, 0)
        assert [engine.page.read(rank).step for rank in range(2)] == [3, 3]
        assert engine.page.read(1).bytes_loaded == engine.page.read(1).bytes_total > 0

        engine.send(StopServing())
        assert engine.exit_codes() == [0, 0]
        assert engine.page.read(0).phase == Phase.LEAVING


def test_rank_that_waits_for_a_stopped_one_is_not_the_silent_one(checkpoint: ServerConfig):
    with running_ranks(checkpoint, tensor_parallel_size=2) as engine:
        start_serving(engine)
        engine.processes[1].send_signal(signal.SIGSTOP)
        stopped = engine.page.read(1).beat
        engine.send(StepPlan(0))  # rank 0 goes to the barrier and waits
        waited = time.monotonic()
        while engine.page.read(0).beat < waited + 2.5:
            assert time.monotonic() < waited + 30, "rank 0 fell silent while it waited"
            time.sleep(0.05)
        assert engine.page.silent_ranks(2.0) == [1] and engine.page.read(1).beat - stopped < 2.0
        engine.processes[1].send_signal(signal.SIGCONT)
        assert engine.receive(StepResult).step == 0


def test_rank_that_fails_says_why_and_exits_with_one(checkpoint: ServerConfig):
    with running_ranks(checkpoint) as engine:
        start_serving(engine)
        engine.send(StepPlan(7, [Chunk(99, 1, [0], True)]))
        failed = engine.receive(RankFailed)
        assert (failed.rank, failed.step) == (0, 7)
        assert failed.message == "the plan names sequence 99, which was never added"
        assert "Traceback" in failed.traceback and "sequences.py" in failed.traceback
        assert engine.exit_codes() == [1]


def test_model_that_does_not_divide_is_refused_in_words(checkpoint: ServerConfig):
    with running_ranks(checkpoint, tensor_parallel_size=3) as engine:
        engine.receive_all(RankHello)
        for failed in engine.receive_all(RankFailed):
            assert failed.message.startswith("--tensor-parallel-size 3 does not divide num_attention")
        assert engine.exit_codes() == [1, 1, 1]


def test_rank_ends_when_its_parent_dies(checkpoint: ServerConfig):
    script = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-m', 'workers', sys.argv[1], '0'])\n"
        "time.sleep(600)\n"
    )
    with open_engine_side(checkpoint) as engine:
        parent = subprocess.Popen([sys.executable, "-c", script, str(engine.run.root)], cwd=ROOT)
        engine.processes.append(parent)
        rank = os.pidfd_open(engine.receive(RankHello).pid)
        parent.kill()
        poll = select.poll()
        poll.register(rank, select.POLLIN)
        assert poll.poll(30_000), "the rank outlived its parent"
        os.close(rank)

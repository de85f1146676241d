"""Steps on a GPU: recorded and not, one issued before the other's tokens are known, alone and together.

The device is the real one of each framework on a fake GPU, the ops are the CUDA kernels in the emulator.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import EngineError
from engine.messages import Chunk, NewSequence, SamplingParams, StepPlan
from engine.plan_activations import step_bytes
from engine.plan_gpu import gpu_step_bytes
from engine.plan_weights import kv_bytes_per_token
from tests.checks import assert_close
from tests.conftest import Rand
from tests.workers.builders import Prompt, make_prompt
from tests.workers.fake_cuda import FakePaddleGpu, streamed_ops, torch_gpu
from tests.workers.gpu_ranks import LIMITS, GpuRanks, make_gpu_config
from tests.workers.ranks import GREEDY, Driver, tokens_of
from workers.batch import HostBatch
from workers.device.base import BYTES_PER_ELEMENT
from workers.graphs import graph_sizes
from workers.model.workspace import Workspace

MODEL = make_gpu_config()
TEXT, MIXED = [5], [3, (1, 4, 6), 2]  # an image of 6 tokens between text
RANDOM = SamplingParams(max_tokens=100, temperature=0.9, top_p=0.9, top_k=50, seed=11, num_logprobs=2)
PENALTIES = SamplingParams(
    max_tokens=100, temperature=0.9, seed=5, num_logprobs=0, presence_penalty=2.0, repetition_penalty=1.3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module", autouse=True)
def stream() -> Iterator[None]:
    with streamed_ops():
        yield


@pytest.fixture(scope="module")
def ranks(folder: Path) -> GpuRanks:
    """One rank that records its decode steps."""
    return GpuRanks(MODEL, folder)


def outputs(ranks: GpuRanks, prompts: list[Prompt], count: int, sampling: SamplingParams) -> list[Any]:
    """Everything the outside sees of the prompts' answers, made together."""
    driver = Driver(ranks)  # type: ignore[arg-type]
    ids = [driver.add(prompt, sampling) for prompt in prompts]
    driver.generate(ids, count)
    bits = [driver.bits(seq_id) for seq_id in ids]
    for seq_id in ids:
        driver.drop(seq_id)
    driver.step({})
    return bits


@pytest.fixture
def prompts(rand: Rand, folder: Path) -> list[Prompt]:
    return [make_prompt(rand, MODEL, folder, parts) for parts in (TEXT, MIXED, [2, (2, 4, 4), 1])]


# recorded steps -----------------------------------------------------------------------------------------


def test_graphs_are_close_together_where_batches_are_small():
    assert graph_sizes(1) == [1]
    assert graph_sizes(6) == [1, 2, 4, 6]
    assert graph_sizes(256)[-3:] == [224, 240, 256]
    assert [b - a for a, b in zip(graph_sizes(512), graph_sizes(512)[1:], strict=False)][-1] == 32


def test_recorded_steps_give_the_bits_of_steps_issued_op_by_op(
    rand: Rand, folder: Path, ranks: GpuRanks, prompts: list[Prompt]
):
    expected = outputs(GpuRanks(MODEL, folder, has_graphs=False), prompts, 3, RANDOM)
    launched = ranks.cudas[0].num_launches
    assert outputs(ranks, prompts, 3, RANDOM) == expected, rand
    assert ranks.cudas[0].num_launches == launched + 2  # three sequences in a graph of four


def test_int8_kv_gives_recorded_steps_in_company_the_bits_of_a_sequence_alone(
    rand: Rand, folder: Path, prompts: list[Prompt]
):
    plain = GpuRanks(MODEL, folder, has_graphs=False, kv_dtype="int8", block_size=8)
    expected = [outputs(plain, [prompt], 3, RANDOM)[0] for prompt in prompts]
    recorded = GpuRanks(MODEL, folder, kv_dtype="int8", block_size=8)
    assert outputs(recorded, prompts, 3, RANDOM) == expected, rand


def test_frameworks_give_the_same_bits(rand: Rand, folder: Path, ranks: GpuRanks, prompts: list[Prompt]):
    """Of text; an image goes through each framework's own products."""
    torch = GpuRanks(MODEL, folder, framework=torch_gpu())
    assert outputs(torch, prompts[:1], 3, RANDOM) == outputs(ranks, prompts[:1], 3, RANDOM), rand
    seen = (outputs(one, prompts[1:2], 1, GREEDY)[0][0] for one in (torch, ranks))
    (_, logprob, *_), (_, expected, *_) = seen
    assert_close(np.float32(logprob), np.float32(expected), 0.05, f"{rand}")


def test_answer_is_the_same_alone_and_among_others(rand: Rand, ranks: GpuRanks, prompts: list[Prompt]):
    expected = [outputs(ranks, [prompt], 3, RANDOM)[0] for prompt in prompts]
    assert outputs(ranks, prompts, 3, RANDOM) == expected, rand


def test_padding_rows_leave_other_sequences_alone(rand: Rand, ranks: GpuRanks, prompts: list[Prompt]):
    """Three of four rows decode; the KV of a sequence that waits meanwhile stays as it is."""
    expected = outputs(ranks, prompts[:1], 5, GREEDY)
    driver = Driver(ranks, seed=1)  # type: ignore[arg-type]
    waiting, *others = [driver.add(prompts[0]), *(driver.add(prompt) for prompt in prompts)]
    driver.generate([waiting, *others], 2)
    driver.generate(others, 3)
    driver.generate([waiting], 3)
    assert [driver.bits(waiting)] == expected, rand


def test_what_fits_no_graph_is_issued_op_by_op(folder: Path, rand: Rand, ranks: GpuRanks):
    graphs = ranks.runners[0]._graphs
    assert graphs is not None and graphs.num_graphs == 4

    def batch(queries: list[int], kv_lens: list[int], samples: int) -> HostBatch:
        total, nothing = sum(queries), np.zeros(0, np.int32)
        tables = np.zeros((len(queries), -(-max(kv_lens) // ranks.block_size)), np.int32)
        starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
        return HostBatch(
            np.zeros(total, np.int32), nothing, nothing, nothing, tables, starts,
            np.array(kv_lens, np.int32), np.zeros(samples, np.int32),
        )  # fmt: skip

    assert graphs.fits(batch([1] * 6, [64] * 6, 6))
    assert not graphs.fits(batch([1] * 7, [8] * 7, 7)), "more sequences than the largest graph"
    assert not graphs.fits(batch([2], [8], 1)), "a prompt"
    assert not graphs.fits(batch([1, 1], [8, 8], 1)), "the last token of a chunk that samples nothing"
    assert not graphs.fits(batch([1], [65], 1)), "longer than a sequence may be"


def test_long_sequences_together_may_exceed_what_a_graph_was_recorded_for(ranks: GpuRanks):
    graphs = ranks.runners[0]._graphs
    assert graphs is not None
    recorded = graphs._of(1)
    assert recorded.num_tasks == 1 + LIMITS.num_sequences * LIMITS.num_sequence_tokens // 256


# one step before the other's tokens ---------------------------------------------------------------------


class Overlapping:
    """Plans of some sequences, each sent before the tokens of the one before are known."""

    def __init__(self, ranks: GpuRanks, prompts: list[Prompt], sampling: SamplingParams) -> None:
        self.ranks, self.step = ranks, 0
        self.ids = [100_000 + i for i in range(len(prompts))]
        self.lengths = [len(prompt.token_ids) for prompt in prompts]
        self.free = list(range(ranks.num_blocks))
        self.blocks = [0] * len(prompts)
        self.new = [
            NewSequence(seq_id, prompt.token_ids, len(prompt.token_ids), sampling, prompt.media)
            for seq_id, prompt in zip(self.ids, prompts, strict=True)
        ]

    def next_plan(self) -> StepPlan:
        is_first = self.step == 0
        chunks = []
        for i, seq_id in enumerate(self.ids):
            self.lengths[i] += not is_first
            missing = -(-self.lengths[i] // self.ranks.block_size) - self.blocks[i]
            blocks = [self.free.pop() for _ in range(missing)]
            self.blocks[i] += missing
            chunks.append(Chunk(seq_id, self.lengths[i] if is_first else 1, blocks, True))
        self.step += 1
        return StepPlan(self.step, chunks, self.new if is_first else [])

    def run(self, count: int) -> list[list[tuple[Any, ...]]]:
        bits: list[list[tuple[Any, ...]]] = [[] for _ in self.ids]
        running: list[tuple[StepPlan, list[Any]]] = []
        for _ in range(count):
            plan = self.next_plan()
            running.append((plan, self.ranks.launch(plan)))
            if len(running) > 1:
                self.collect(*running.pop(0), bits)
        self.collect(*running.pop(0), bits)
        self.ranks.run(StepPlan(self.step + 1, dropped=self.ids))
        return bits

    def collect(self, plan: StepPlan, steps: list[Any], bits: list[list[tuple[Any, ...]]]) -> None:
        results = self.ranks._threads.run(lambda device: steps[device.rank].result())
        for one, token in zip(bits, tokens_of(results[0], plan), strict=True):
            assert token.logprobs is not None
            one.append(
                (
                    token.token_id,
                    token.logprobs.logprob,
                    *token.logprobs.top_ids,
                    *token.logprobs.top_logprobs,
                )
            )


def test_step_takes_its_tokens_from_the_last_one_without_the_host(
    rand: Rand, ranks: GpuRanks, prompts: list[Prompt]
):
    expected = outputs(ranks, prompts, 4, RANDOM)
    assert Overlapping(ranks, prompts, RANDOM).run(4) == expected, rand


def test_two_steps_wait_on_the_stream_and_nobody_for_them(ranks: GpuRanks, prompts: list[Prompt]):
    overlapping, cuda = Overlapping(ranks, prompts[:1], GREEDY), ranks.cudas[0]
    steps = [ranks.launch(overlapping.next_plan())[0] for _ in range(2)]
    assert cuda.num_queued() > 20 and not any(step.is_done() for step in steps)
    third = ranks.on_ranks(lambda runner: runner.launch(overlapping.next_plan()))[0]
    assert steps[0].is_done() and not steps[1].is_done(), "a third step waits for the first"
    for step in (*steps, third):
        assert ranks.on_ranks(lambda runner, step=step: step.result())[0].num_tokens == 1
    ranks.run(StepPlan(99, dropped=overlapping.ids))


def test_penalties_see_every_token_also_when_steps_overlap(
    rand: Rand, ranks: GpuRanks, prompts: list[Prompt]
):
    expected = outputs(ranks, prompts[:2], 5, PENALTIES)
    overlapping, bits, running = Overlapping(ranks, prompts[:2], PENALTIES), [[], []], []  # type: ignore[var-annotated]
    for _ in range(5):
        plan = overlapping.next_plan()
        steps = ranks.on_ranks(lambda runner, plan=plan: runner.launch(plan))  # may wait for the step before
        running.append((plan, steps))
    for plan, steps in running:
        overlapping.collect(plan, steps, bits)
    assert bits == expected, rand
    ranks.run(StepPlan(99, dropped=overlapping.ids))


def test_host_that_waits_inside_a_step_is_caught(ranks: GpuRanks, monkeypatch: pytest.MonkeyPatch):
    runner = ranks.runners[0]
    forward = runner._forward
    monkeypatch.setattr(runner, "_forward", lambda *args: runner._device.synchronize() or forward(*args))
    plan = StepPlan(1, [Chunk(7, 2, [0], True)], [NewSequence(7, [5, 6], 2, GREEDY)])
    with pytest.raises(AssertionError, match="waited for the GPU inside a step"):
        ranks.launch(plan)
    ranks.run(StepPlan(2, dropped=[7]))


def test_logits_that_are_no_numbers_end_the_step_with_a_sentence(ranks: GpuRanks):
    runner = ranks.runners[0]
    norm = runner._runnable._weights.decoder.norm
    kept = runner._device.download(norm)
    runner._device.write(norm, np.full(norm.shape, np.nan, np.float32))
    plan = StepPlan(1, [Chunk(8, 2, [0], True)], [NewSequence(8, [5, 6], 2, GREEDY)])
    with pytest.raises(EngineError, match="logits of sequence 8 are not numbers"):
        ranks.run(plan)
    runner._device.write(norm, kept)
    ranks.run(StepPlan(2, dropped=[8]))


# ranks --------------------------------------------------------------------------------------------------


def test_blocks_that_went_to_the_host_and_back_elsewhere_give_the_same_answer(
    rand: Rand, folder: Path, prompts: list[Prompt]
):
    expected = outputs(GpuRanks(MODEL, folder), prompts[1:2], 4, RANDOM)[0]
    ranks = GpuRanks(MODEL, folder, num_host_blocks=8)
    driver = Driver(ranks)  # type: ignore[arg-type]
    seq_id, other = driver.add(prompts[1], RANDOM), driver.add(prompts[0], RANDOM)
    driver.generate([seq_id, other], 2)
    blocks = driver._blocks[seq_id]
    out = [(block, place) for place, block in enumerate(blocks)]
    ranks.launch(StepPlan(100, [driver._chunk(other, 1)], swap_out=out))  # fails if it waits for the copies
    taken = [*blocks, *driver._blocks[other]]
    elsewhere = [block for block in range(ranks.num_blocks) if block not in taken][: len(blocks)]
    back = [(place, block) for place, block in enumerate(elsewhere)]
    again = NewSequence(1000, [*prompts[1].token_ids, *driver.tokens(seq_id)], len(prompts[1].token_ids),
                        RANDOM, prompts[1].media, driver._num_computed[seq_id])  # fmt: skip
    plan = StepPlan(101, [Chunk(1000, 1, elsewhere, True)], [again], [seq_id], swap_in=back)
    found = tokens_of(ranks.run(plan), plan)[0]
    assert found.token_id == expected[2][0], f"{rand}: {found} is not {expected[2]}"
    assert found.logprobs is not None and found.logprobs.logprob == expected[2][1], rand


def test_canary_on_a_gpu_knows_whose_blocks_are_whose(rand: Rand, folder: Path, prompts: list[Prompt]):
    expected = outputs(GpuRanks(MODEL, folder), prompts[1:2], 3, RANDOM)[0]
    driver = Driver(GpuRanks(MODEL, folder, kv_canary=True))  # type: ignore[arg-type]
    first, other = driver.add(prompts[1], RANDOM), driver.add(prompts[0], RANDOM)
    driver.generate([first, other], 2)
    same = driver.add_with_cached_blocks(prompts[1], first, 1)
    driver.generate([same], 3)
    assert driver.bits(same) == expected, rand
    wrong = driver.add_with_cached_blocks(prompts[1], other, 1)
    with pytest.raises(EngineError, match=r"KV block \d+ was given to sequence"):
        driver.generate([wrong], 1)


def test_two_gpus_agree_with_one(rand: Rand, folder: Path, prompts: list[Prompt]):
    single, pair = (GpuRanks(MODEL, folder, world=world, quantization="wint8") for world in (1, 2))
    (one,), (two,) = (outputs(each, prompts[1:2], 1, GREEDY) for each in (single, pair))
    assert_close(np.float32(two[0][1]), np.float32(one[0][1]), 0.05, f"{rand}")
    expected = outputs(pair, prompts, 3, RANDOM)
    assert Overlapping(pair, prompts, RANDOM).run(3) == expected, rand
    assert pair.cudas[1].num_launches >= 4


def test_pieces_of_two_steps_add_up_to_how_long_the_host_is_patient(folder: Path, prompts: list[Prompt]):
    promised: list[float] = []
    ranks = GpuRanks(MODEL, folder, has_graphs=False, on_progress=promised.append)
    overlapping = Overlapping(ranks, prompts[:1], GREEDY)
    for _ in range(2):
        promised.append(0.0)
        ranks.launch(overlapping.next_plan())
    first, second = (np.array(one) for one in split(promised, 0.0)[-2:])
    assert (np.diff(first) > 0).all() and (np.diff(second) > 0).all() and second[0] > first[-1] > 0


def split(values: list[float], mark: float) -> list[list[float]]:
    """The runs of values between the marks."""
    runs: list[list[float]] = [[]]
    for value in values:
        if value == mark:
            runs.append([])
        else:
            runs[-1].append(value)
    return runs


# memory -------------------------------------------------------------------------------------------------


def test_first_long_prompt_finds_its_memory_taken(rand: Rand, folder: Path, monkeypatch: pytest.MonkeyPatch):
    ranks = GpuRanks(MODEL, folder)
    made: list[int] = []
    allocate = FakePaddleGpu._allocate

    def noted(device: Any, shape: Any, dtype: Any) -> Any:
        made.append(prod(shape) * BYTES_PER_ELEMENT[dtype])
        return allocate(device, shape, dtype)

    monkeypatch.setattr(FakePaddleGpu, "_allocate", noted)
    outputs(ranks, [make_prompt(rand, MODEL, folder, [LIMITS.num_tokens - 2])], 1, GREEDY)
    uploads = 12 * 64 * 4  # the batch's arrays, aligned
    assert max(made) <= uploads, f"{rand}: {sorted(made)}"


def test_memory_plan_covers_what_a_rank_takes_for_its_steps(folder: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[Workspace] = []
    keep = Workspace.__init__
    monkeypatch.setattr(
        Workspace, "__init__", lambda self, device: (keep(self, device), made.append(self))[0]
    )
    fresh = GpuRanks(MODEL, folder)
    runner = fresh.runners[0]
    assert runner._graphs is not None
    measured = len(runner._device._scratch) + 4 * len(runner._graphs._memory)
    measured += 4 * prod(runner._graphs._tables.shape)
    for workspace in made:
        for (name, dtype), buffer in workspace._buffers.items():
            if not name.startswith(("encoder", "resampler")):
                measured += len(buffer.memory) * BYTES_PER_ELEMENT[dtype]

    limits = (LIMITS.num_tokens, LIMITS.num_sequences)
    predicted = step_bytes(MODEL, 1, *limits, "bfloat16") + gpu_step_bytes(
        MODEL,
        1,
        "bfloat16",
        "bfloat16",
        num_tokens=LIMITS.num_tokens,
        num_sequences=LIMITS.num_sequences,
        sequence_tokens=LIMITS.num_sequence_tokens,
        free=kv_bytes_per_token(MODEL, 1) * fresh.num_blocks * fresh.block_size,
    )
    assert predicted / 3 < measured <= predicted

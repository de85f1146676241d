"""Ranks of one model in one process, and a small engine that drives them with plans.

Ranks run on threads that take turns: one computes until it waits in a collective, so a test needs no
processes. The collectives are the real ones.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

import cuda_ops
from engine.messages import Chunk, NewSequence, SamplingParams, StepPlan, StepResult, TokenLogprobs
from engine.model_config import ModelConfig
from tests.workers.builders import Prompt, RawWeights, place_weights
from workers.device.base import Device
from workers.device.paddle import PaddleCpu
from workers.runner import Runner
from workers.sequences import chunks_of

Result = TypeVar("Result")

BLOCK_SIZE = 4
_SEQ_IDS = itertools.count()  # never repeated, so drivers may share ranks one after the other
GREEDY = SamplingParams(max_tokens=1 << 20, temperature=0.0, num_logprobs=8)


class SampledToken(NamedTuple):
    """One row of a StepResult."""

    seq_id: int
    token_id: int
    logprobs: TokenLogprobs | None = None


class TurnGroup:
    """A rank's real collectives, which let another rank compute while this one waits."""

    def __init__(self, group: cuda_ops.SharedMemoryGroup, turn: threading.Lock) -> None:
        self._group, self._turn = group, turn

    def all_reduce(self, tensor: Any) -> None:
        self._wait(self._group.all_reduce, tensor)

    def all_gather(self, tensor: Any, out: Any) -> None:
        self._wait(self._group.all_gather, tensor, out)

    def broadcast(self, tensor: Any, root: int) -> None:
        self._wait(self._group.broadcast, tensor, root)

    def barrier(self) -> None:
        self._wait(self._group.barrier)

    def abort(self) -> None:
        self._group.abort()

    def close(self) -> None:
        self._group.close()

    def _wait(self, collective: Callable[..., None], *arguments: Any) -> None:
        self._turn.release()
        try:
            collective(*arguments)
        finally:
            self._turn.acquire()


class RankThreads:
    """`world` devices whose ranks run the same function, each on its thread."""

    def __init__(self, world: int, open_device: Callable[..., Device] = PaddleCpu) -> None:
        """`open_device` takes rank, world and group."""
        self._turn = threading.Lock()
        self._pool = ThreadPoolExecutor(world)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "collective"
            self._groups = list(
                self._pool.map(lambda rank: self._open_group(path, rank, world), range(world))
            )
        self.devices = [
            open_device(rank, world, group if world > 1 else None) for rank, group in enumerate(self._groups)
        ]

    def run(self, function: Callable[[Device], Result]) -> list[Result]:
        """The results in rank order; the first error of any rank is raised."""
        return list(self._pool.map(lambda device: self._run_in_turn(function, device), self.devices))

    def _open_group(self, path: Path, rank: int, world: int) -> TurnGroup:
        return TurnGroup(cuda_ops.SharedMemoryGroup(path, rank, world, timeout=60.0), self._turn)

    def _run_in_turn(self, function: Callable[[Device], Result], device: Device) -> Result:
        with self._turn:
            try:
                return function(device)
            except BaseException:
                self._groups[device.rank].abort()
                raise


class Ranks:
    """`world` runners of one model; `run` gives all of them the same plan."""

    def __init__(
        self,
        config: ModelConfig,
        raw: RawWeights,
        media_folder: Path,
        *,
        world: int = 1,
        dtype: str = "",
        num_blocks: int = 256,
        block_size: int = BLOCK_SIZE,
        open_device: Callable[..., Device] = PaddleCpu,
        **runner_options: Any,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._threads = RankThreads(world, open_device)
        dtype = dtype or config.dtype

        def make(device: Device) -> Runner:
            return Runner(
                config,
                place_weights(raw, config, device, dtype),
                device,
                dtype,  # type: ignore[arg-type]
                media_folder,
                num_blocks=num_blocks,
                block_size=block_size,
                **runner_options,
            )

        self._runners = self._threads.run(make)

    def run(self, plan: StepPlan) -> StepResult:
        """Rank 0's result; the other ranks must have learnt the same tokens."""
        results = self._threads.run(lambda device: self._runners[device.rank].run(plan))
        tokens = [[token[:2] for token in tokens_of(result, plan)] for result in results]
        assert all(one == tokens[0] for one in tokens), f"ranks disagree: {tokens}"
        return results[0]


def tokens_of(result: StepResult, plan: StepPlan) -> list[SampledToken]:
    """The sampled tokens of a step, with their sequences."""
    sampled = [chunk.seq_id for chunk in chunks_of(plan) if chunk.samples]
    token_ids = np.frombuffer(result.token_ids, np.int32).tolist()
    return [
        SampledToken(seq_id, token_id, result.logprobs.get(row))
        for row, (seq_id, token_id) in enumerate(zip(sampled, token_ids, strict=True))
    ]


class Driver:
    """Adds sequences and runs steps as the engine would, with blocks handed out at random places."""

    def __init__(self, ranks: Ranks, seed: int = 0) -> None:
        self.ranks = ranks
        self._free = np.random.default_rng(seed).permutation(ranks.num_blocks).tolist()
        self._step = 0
        self._added: list[NewSequence] = []
        self._dropped: list[int] = []
        self._blocks: dict[int, list[int]] = {}
        self._unsent_blocks: dict[int, list[int]] = {}  # cached ones, before the first chunk
        self._num_computed: dict[int, int] = {}
        self._num_known: dict[int, int] = {}  # prompt and output tokens
        self._prompts: dict[int, tuple[Prompt, SamplingParams]] = {}
        self.outputs: dict[int, list[SampledToken]] = {}

    def add(
        self, prompt: Prompt, sampling: SamplingParams = GREEDY, generated: list[int] | None = None
    ) -> int:
        seq_id = next(_SEQ_IDS)
        self._prompts[seq_id] = (prompt, sampling)
        self.outputs[seq_id] = []
        self._announce(seq_id, generated or [])
        return seq_id

    def add_with_cached_blocks(self, prompt: Prompt, source: int, num_blocks: int) -> int:
        """Add a sequence whose first blocks are another's, as after a hit in a prefix cache."""
        seq_id = next(_SEQ_IDS)
        self._prompts[seq_id] = (prompt, self._prompts[source][1])
        self.outputs[seq_id] = []
        self._announce(seq_id, [], self._blocks[source][:num_blocks])
        return seq_id

    def preempt(self, seq_id: int) -> None:
        """Take the sequence's blocks and add it again with what it has generated."""
        self.drop(seq_id)
        self._announce(seq_id, [token.token_id for token in self.outputs[seq_id]])

    def drop(self, seq_id: int) -> None:
        self._dropped.append(seq_id)
        self._free += self._blocks.pop(seq_id)

    def num_uncomputed(self, seq_id: int) -> int:
        return self._num_known[seq_id] - self._num_computed[seq_id]

    def step(self, num_tokens: dict[int, int]) -> StepResult:
        """Compute so many tokens of each sequence, in the dictionary's order."""
        chunks = [self._chunk(seq_id, count) for seq_id, count in num_tokens.items()]
        plan = StepPlan(self._step, chunks, self._added, self._dropped)
        self._step, self._added, self._dropped = self._step + 1, [], []
        result = self.ranks.run(plan)
        for token in tokens_of(result, plan):
            self.outputs[token.seq_id].append(token)
            self._num_known[token.seq_id] += 1
        return result

    def generate(self, seq_ids: list[int], count: int, chunk_sizes: list[int] | None = None) -> None:
        """Prefill the sequences (at once, or in chunks of these sizes), then decode `count` tokens each."""
        for size in chunk_sizes or []:
            self.step(dict.fromkeys(seq_ids, size))
        target = {seq_id: len(self.outputs[seq_id]) + count for seq_id in seq_ids}
        while waiting := [seq_id for seq_id in seq_ids if len(self.outputs[seq_id]) < target[seq_id]]:
            self.step({seq_id: self.num_uncomputed(seq_id) for seq_id in waiting})

    def tokens(self, seq_id: int) -> list[int]:
        return [token.token_id for token in self.outputs[seq_id]]

    def bits(self, seq_id: int) -> list[tuple[Any, ...]]:
        """Everything the outside sees of a sequence's output, to be compared for equality."""
        return [
            (t.token_id, t.logprobs.logprob, *t.logprobs.top_ids, *t.logprobs.top_logprobs)
            for t in self.outputs[seq_id]
            if t.logprobs is not None
        ]

    def _announce(self, seq_id: int, generated: list[int], cached_blocks: list[int] | None = None) -> None:
        prompt, sampling = self._prompts[seq_id]
        token_ids = prompt.token_ids + generated
        self._unsent_blocks[seq_id] = list(cached_blocks or [])
        self._blocks[seq_id] = list(cached_blocks or [])
        self._num_computed[seq_id] = len(self._blocks[seq_id]) * self.ranks.block_size
        self._num_known[seq_id] = len(token_ids)
        self._added.append(
            NewSequence(
                seq_id,
                token_ids,
                len(prompt.token_ids),
                sampling,
                prompt.media,
                self._num_computed[seq_id],
            )
        )

    def _chunk(self, seq_id: int, count: int) -> Chunk:
        computed = self._num_computed[seq_id] + count
        missing = -(-computed // self.ranks.block_size) - len(self._blocks[seq_id])
        new_blocks = [self._free.pop(0) for _ in range(max(missing, 0))]
        self._blocks[seq_id] += new_blocks
        self._num_computed[seq_id] = computed
        sent = self._unsent_blocks.pop(seq_id, []) + new_blocks
        return Chunk(seq_id, count, sent, samples=computed == self._num_known[seq_id])

"""One step of rank 0 of eight of the 424B preset at wint4, on one GPU, with the workers' own code.

The 28B preset whole (--plan 28b) goes the same way.

Method
    Random weights of the real shapes and formats (experts int4 in groups of 64, attention and dense layers
    int8, head bf16) fill all 54 layers; keys and values are random. The other ranks are absent: a collective
    is a copy. Decode is the recorded graph of so many sequences, all with the same context; prefill is one
    chunk from position 0. Sampling is measured by speed.py.
Bytes and flops
    decode: every weight but the experts', the text experts that so many random tokens meet
    (E (1 - (1 - k/E)^S) of E), and the KV of all sequences. prefill: 2 per active weight and token, and
    4 per query, key and channel of attention.
How to read it
    over_bytes: time over bytes / measured read bandwidth; design section 5 asks for at most 1.3. A shape
    whose KV does not fit is null.
Reference
    tests/gpu/results/; 8 x H100 floors are in B.0 of the design's anchors: 3.75, 8.9, 17.3, 19.5 GB per step
Run
    python -m tests.gpu.rank_step [--plan 424b|28b|small] [--emulated]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cuda_ops
from engine.model_config import ModelConfig, read_model_config
from tests.gpu.figures import Figures, add_options, show
from tests.gpu.machine import Machine, open_machine
from tests.gpu.rank_weights import random_rank, resident, touched_bytes
from tests.gpu.speed import Ceilings
from workers.batch import Batch, HostBatch
from workers.device.gpu import GpuDevice
from workers.gpu_memory import StepLimits, scratch_bytes
from workers.graphs import DecodeGraphs
from workers.kv_cache import KvCache, block_bytes
from workers.model.ernie_vl import ErnieVl
from workers.parallel import Share, share_of

PRESETS = Path(__file__).parents[2] / "models" / "presets"
PRESET_424B, PRESET_28B = "ernie-4.5-vl-424b-a47b.json", "ernie-4.5-vl-28b-a3b.json"
BLOCK_SIZE = 64
RESERVE = 6 << 30  # bytes beside weights and KV: activations, graphs, plans
NO_VISION = 2**31 - 1


class AbsentPeers:
    """Collectives with ranks that are not there: the own bytes are copied."""

    def __init__(self, world: int) -> None:
        self.world = world

    def all_reduce(self, tensor: torch.Tensor) -> None:
        tensor.copy_(tensor.clone())

    def all_gather(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        for part in out:
            part.copy_(tensor)

    def broadcast(self, tensor: torch.Tensor, root: int) -> None: ...

    def barrier(self) -> None: ...

    def close(self) -> None: ...


@contextmanager
def open_rank(is_emulated: bool, world: int) -> Iterator[tuple[Machine, GpuDevice]]:
    """The workers' PyTorch device as rank 0, on the GPU or on the tests' fake of one."""
    if is_emulated:
        from tests.workers.fake_cuda import FakeCuda, streamed_ops, torch_gpu

        with streamed_ops():
            device = torch_gpu()(0, world, AbsentPeers(world), FakeCuda(world))  # type: ignore[call-arg, arg-type]
            yield Machine(torch.device("cpu"), "emulator", True, 1), device
            device.close()
        return
    from workers.device.driver import Driver
    from workers.device.torch_gpu import TorchGpu

    with open_machine(False, repeats=5) as machine:
        device = TorchGpu(Driver(0), 0, world)
        device.join(AbsentPeers(world))
        yield machine, device
        device.close()


class RankStep:
    """The model of one rank, its KV cache and its recorded steps."""

    def __init__(
        self, machine: Machine, device: GpuDevice, model: ModelConfig, limits: StepLimits, num_blocks: int
    ) -> None:
        self.machine, self.device, self.model = machine, device, model
        self.share = share_of(model, 0, device.world)
        self.weights = random_rank(machine, model, self.share)
        device.synchronize()
        num_blocks = num_blocks or self._blocks_that_fit()
        self.kv = KvCache.allocate(device, model, self.share, "bfloat16", num_blocks, BLOCK_SIZE)
        for layer in self.kv.layers:
            for cache in layer:
                cache.normal_()  # unwritten bits may be NaN, which would send every token to one expert
        device.lend_scratch(scratch_bytes(model, self.share, limits))
        self.runnable = ErnieVl(model, self.weights, device, "bfloat16")
        samples = device.zeros((limits.num_sequences,), "int32")
        self.graphs = DecodeGraphs(
            device, self.runnable.new_decoder(), self.kv, limits, samples, NO_VISION, lambda: None
        )

    def _blocks_that_fit(self) -> int:
        return (self.device.free_memory() - RESERVE) // block_bytes(
            self.model, self.share, "bfloat16", BLOCK_SIZE
        )

    def fits(self, num_sequences: int, context: int) -> bool:
        return num_sequences * -(-context // BLOCK_SIZE) * BLOCK_SIZE <= self.kv.num_tokens

    def decode_seconds(self, num_sequences: int, context: int) -> float:
        host = self._batch([(1, context)] * num_sequences)
        if not self.graphs.fits(host):
            raise ValueError(f"no graph was recorded for {num_sequences} sequences of {context} tokens")
        logits = self.graphs.run(host, None)
        self.device.synchronize()
        if logits is None or not bool(torch.isfinite(logits).all()):
            raise ValueError(f"logits of {num_sequences} sequences of {context} tokens are not finite")
        recorded = self.graphs._of(num_sequences)

        def step() -> None:
            recorded.graph.replay()
            if self.machine.is_emulated:
                self.device.synchronize()  # the fake GPU works when somebody waits

        return self.machine.seconds(step, is_warm=True)

    def prefill_seconds(self, chunk: int) -> float:
        host = self._batch([(chunk, chunk)])
        batch = Batch.upload(host, self.device)
        group = self.share.num_q_heads // self.share.num_kv_heads
        batch.attention_tasks = cuda_ops.attention_tasks([(chunk, chunk)], group)

        def step() -> None:
            self.runnable.run(batch, [], self.kv)
            if self.machine.is_emulated:
                self.device.synchronize()

        return self.machine.seconds(step, is_warm=True)

    def _batch(self, lens: list[tuple[int, int]]) -> HostBatch:
        """Sequences of (num_queries, kv_len) with random text, in blocks one behind the other."""
        random = np.random.default_rng(1)
        widths = [-(-length // BLOCK_SIZE) for _, length in lens]
        tables = np.zeros((len(lens), max(widths)), np.int32)
        for row, (end, width) in enumerate(zip(np.cumsum(widths), widths, strict=True)):
            tables[row, :width] = np.arange(end - width, end)
        places = [np.arange(length - n, length, dtype=np.int32) for n, length in lens]
        slots = [
            table[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
            for table, place in zip(tables, places, strict=True)
        ]
        starts = np.cumsum([0] + [n for n, _ in lens]).astype(np.int32)
        num_tokens = int(starts[-1])
        return HostBatch(
            token_ids=random.integers(0, self.model.vocab_size - 1, num_tokens).astype(np.int32),
            positions=np.tile(np.concatenate(places), (3, 1)),
            slots=np.concatenate(slots).astype(np.int32),
            token_types=np.zeros(num_tokens, np.int32),
            block_tables=tables,
            query_starts=starts,
            kv_lens=np.array([length for _, length in lens], np.int32),
            sample_rows=starts[1:] - 1,
        )


@dataclass(frozen=True)
class Plan:
    """What is measured of one model."""

    model: ModelConfig
    world: int
    sequences: tuple[int, ...]
    contexts: tuple[int, ...]
    chunks: tuple[int, ...]
    limits: StepLimits
    num_blocks: int = 0  # as many as fit


def plan_424b() -> Plan:
    limits = StepLimits(num_tokens=8192, num_sequences=64, num_sequence_tokens=131072)
    contexts = (1024, 8192, 32768, 131072)
    return Plan(
        read_model_config(PRESETS / PRESET_424B), 8, (1, 4, 16, 64), contexts, (384, 2048, 8192), limits
    )


def plan_28b() -> Plan:
    """At the lengths of serving.py, to tell how long the GPU waits between its steps."""
    limits = StepLimits(num_tokens=2048, num_sequences=100, num_sequence_tokens=8192)
    return Plan(read_model_config(PRESETS / PRESET_28B), 1, (1, 16, 100), (3700,), (2048,), limits)


def plan_small() -> Plan:
    from tests.workers.gpu_ranks import make_gpu_config

    limits = StepLimits(num_tokens=64, num_sequences=2, num_sequence_tokens=4096)
    model = make_gpu_config(moe_intermediate_sizes=(128, 64))
    return Plan(model, 2, (1, 2), (70, 4000), (20,), limits, num_blocks=8)


PLANS = {"424b": plan_424b, "28b": plan_28b, "small": plan_small}


def measure_rank(name: str, is_emulated: bool) -> Figures:
    """{"decode, S sequences, L context": ..., "prefill, chunk": ...}."""
    plan = PLANS[name]()
    with open_rank(is_emulated, plan.world) as (machine, device):
        ceilings = Ceilings.measure(machine, name == "small")
        rank = RankStep(machine, device, plan.model, plan.limits, plan.num_blocks)
        figures: Figures = {f"{name} weights": {"gib": resident(rank.weights) / 2**30}}
        for context in plan.contexts:
            for count in plan.sequences:
                title = f"{name} decode, {count} sequences, {context} context"
                figures[title] = _decode(rank, ceilings, count, context)
        for chunk in plan.chunks:
            figures[f"{name} prefill, chunk of {chunk}"] = _prefill(rank, ceilings, chunk)
    return figures


def _decode(rank: RankStep, ceilings: Ceilings, count: int, context: int) -> dict[str, Any]:
    num_bytes = touched_bytes(rank.weights, rank.model, count) + kv_bytes(rank, count * context)
    if not rank.fits(count, context):
        return {"gb": num_bytes / 1e9, "ms": None, "over_bytes": None}
    seconds = rank.decode_seconds(count, context)
    return {
        "gb": num_bytes / 1e9,
        "ms": seconds * 1e3,
        "over_bytes": seconds * ceilings.read_bytes / num_bytes,
        "tokens_per_second": count / seconds,
    }


def kv_bytes(rank: RankStep, num_tokens: int) -> float:
    return num_tokens * block_bytes(rank.model, rank.share, "bfloat16", BLOCK_SIZE) / BLOCK_SIZE


def _prefill(rank: RankStep, ceilings: Ceilings, chunk: int) -> dict[str, Any]:
    seconds = rank.prefill_seconds(chunk)
    flops = chunk * flops_per_token(rank.model, rank.share)
    pairs = chunk * (chunk + 1) / 2
    flops += 4 * pairs * rank.share.num_q_heads * rank.model.head_dim * rank.model.num_layers
    return {
        "ms": seconds * 1e3,
        "tokens_per_second": chunk / seconds,
        "tflops": flops / seconds / 1e12,
        "share_of_peak": flops / seconds / ceilings.bf16_flops,
    }


def flops_per_token(model: ModelConfig, share: Share) -> float:
    """Of one text token in this rank's products, the head apart."""
    h, hd = model.hidden_size, model.head_dim
    attention = (2 * share.num_q_heads + 2 * share.num_kv_heads) * hd * h
    num_moe = len(model.moe_layers)
    dense = (model.num_layers - num_moe) * 3 * h * model.intermediate_size / share.world
    experts = num_moe * 3 * h * model.moe_top_k * (model.moe_intermediate_sizes or (0,))[0] / share.world
    return 2.0 * (model.num_layers * attention + dense + experts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", choices=PLANS, default="424b")
    add_options(parser)
    asked = parser.parse_args()
    show(measure_rank(asked.plan, asked.emulated), asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

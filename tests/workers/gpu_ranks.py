"""Ranks whose device is a fake GPU (fake_cuda.py), with the weights and the memory that a real one has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config import ServerConfig
from engine.messages import StepPlan, StepResult
from engine.model_config import ModelConfig
from tests.workers.builders import make_tiny_config
from tests.workers.fake_cuda import FakeCuda, FakePaddleGpu
from tests.workers.ranks import BLOCK_SIZE, RankThreads, tokens_of
from workers.device.base import Device
from workers.device.gpu import GpuDevice
from workers.gpu_memory import StepLimits
from workers.loader import load_weights
from workers.runner import Runner
from workers.running_step import RunningStep
from workers.tiling import tile_decoder

LIMITS = StepLimits(num_tokens=64, num_sequences=6, num_sequence_tokens=64)


def make_gpu_config(**changes: Any) -> ModelConfig:
    """A small VL model of shapes that the kernels take."""
    shapes = {"head_dim": 32, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2, "moe_layers": (1,)}
    experts = {"moe_intermediate_sizes": (64, 32), "num_shared_experts": 1, "dtype": "bfloat16"}
    return make_tiny_config(**{**shapes, **experts, **changes})


class GpuRanks:
    """`world` runners of one model with dummy weights; stands in for ranks.Ranks.

    has_graphs   False: every step is issued op by op
    """

    def __init__(
        self,
        model: ModelConfig,
        media_folder: Path,
        *,
        world: int = 1,
        framework: type[GpuDevice] = FakePaddleGpu,
        quantization: str = "wint4",
        limits: StepLimits = LIMITS,
        has_graphs: bool = True,
        block_size: int = BLOCK_SIZE,
        **runner_options: Any,
    ) -> None:
        self.block_size, self.num_blocks = block_size, 64
        self.cudas = [FakeCuda(world) for _ in range(world)]
        self.devices: list[Device] = []
        config = ServerConfig(
            load_format="dummy", quantization=quantization, tensor_parallel_size=world, load_threads=1
        )

        def open_device(rank: int, world: int, group: Any) -> Device:
            self.devices.append(framework(rank, world, group, self.cudas[rank]))  # type: ignore[arg-type, call-arg]
            return self.devices[-1]

        def make(device: Device) -> Runner:
            weights = load_weights(config, model, device, device.rank, world)
            tile_decoder(weights.decoder, device, lambda: None)
            device.can_record = has_graphs
            return Runner(
                model,
                weights,
                device,
                "bfloat16",
                media_folder,
                num_blocks=self.num_blocks,
                block_size=self.block_size,
                limits=limits,
                **runner_options,
            )

        self._threads = RankThreads(world, open_device)
        self.runners = self._threads.run(make)

    def run(self, plan: StepPlan) -> StepResult:
        """Rank 0's result; the other ranks must have learnt the same tokens."""
        results = self.on_ranks(lambda runner: runner.run(plan))
        tokens = [[token[:2] for token in tokens_of(result, plan)] for result in results]
        assert all(one == tokens[0] for one in tokens), f"ranks disagree: {tokens}"
        return results[0]

    def launch(self, plan: StepPlan) -> list[RunningStep]:
        """Of every rank; whoever waits for the GPU in there fails."""

        def launch(runner: Runner) -> RunningStep:
            cuda = self.cudas[runner._device.rank]
            cuda.is_in_step = True
            try:
                return runner.launch(plan)
            finally:
                cuda.is_in_step = False

        return self.on_ranks(launch)

    def on_ranks(self, work: Callable[[Runner], Any]) -> list[Any]:
        return self._threads.run(lambda device: work(self.runners[device.rank]))

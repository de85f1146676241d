"""The seam holds: a model gives the same bits whichever framework its tensors belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.messages import SamplingParams
from tests.conftest import Rand
from tests.workers.builders import make_prompt, make_raw_weights, make_tiny_config
from tests.workers.ranks import GREEDY, Driver, Ranks
from workers.device.paddle import PaddleCpu

pytest.importorskip("torch", reason="PyTorch is not installed")
from workers.device.torch import TorchCpu

RANDOM = SamplingParams(
    max_tokens=100, temperature=0.9, top_p=0.9, seed=11, num_logprobs=5, repetition_penalty=1.2, min_tokens=3
)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_and_paddle_give_the_same_bits(rand: Rand, media_folder: Path, dtype: str, world: int):
    config = make_tiny_config(dtype=dtype, num_shared_experts=1, vocab_size=317)
    raw = make_raw_weights(config, rand)
    prompts = [
        make_prompt(rand, config, media_folder, parts) for parts in ([3, (1, 4, 6), 2, (4, 2, 4), 2], [7])
    ]

    def outputs(framework: Any) -> list[list[tuple[Any, ...]]]:
        driver = Driver(Ranks(config, raw, media_folder, world=world, open_device=framework))
        ids = [driver.add(prompt, params) for prompt, params in zip(prompts, (GREEDY, RANDOM), strict=True)]
        driver.generate(ids, 5, chunk_sizes=[4, 2])
        return [driver.bits(seq_id) for seq_id in ids]

    assert outputs(TorchCpu) == outputs(PaddleCpu), rand

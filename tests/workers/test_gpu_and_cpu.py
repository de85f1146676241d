"""One model on a CPU and on a fake GPU: what they answer, from the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.config import ServerConfig
from tests.checks import assert_close
from tests.conftest import Rand
from tests.workers.builders import make_prompt
from tests.workers.fake_cuda import streamed_ops
from tests.workers.gpu_ranks import GpuRanks, make_gpu_config
from tests.workers.ranks import BLOCK_SIZE, Driver
from workers.device.base import DtypeName
from workers.device.paddle import PaddleCpu
from workers.loader import load_weights
from workers.runner import Runner


class CpuRank:
    """Stands in for ranks.Ranks, with the dummy weights that GpuRanks has."""

    block_size, num_blocks = BLOCK_SIZE, 64

    def __init__(self, folder: Path, quantization: str, kv_dtype: DtypeName) -> None:
        device, model = PaddleCpu(), make_gpu_config()
        config = ServerConfig(load_format="dummy", quantization=quantization, load_threads=1)  # type: ignore[arg-type]
        weights = load_weights(config, model, device, 0, 1)
        self.run = Runner(
            model,
            weights,
            device,
            "bfloat16",
            folder,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            kv_dtype=kv_dtype,
        ).run


@pytest.mark.parametrize(
    ("quantization", "kv_dtype", "tolerance"),
    [("bfloat16", "bfloat16", 0.06), ("wint4", "bfloat16", 0.25), ("bfloat16", "int8", 0.06)],
)
def test_a_gpu_means_what_a_cpu_means(
    rand: Rand, media_folder: Path, quantization: str, kv_dtype: DtypeName, tolerance: float
):
    """Beside bf16 weights both differ in the order of sums; beside int4 and int8 ones a CPU rounds more."""
    prompt = make_prompt(rand, make_gpu_config(), media_folder, [3, (1, 4, 6), 2])

    def best_logprobs(ranks: object) -> np.ndarray:
        """Of the token after a prompt with an image."""
        driver = Driver(ranks)  # type: ignore[arg-type]
        seq_id = driver.add(prompt)
        driver.generate([seq_id], 1)
        ((_, logprob, *top),) = driver.bits(seq_id)
        return np.array([logprob, *top[8:]], np.float32)

    expected = best_logprobs(CpuRank(media_folder, quantization, kv_dtype))
    with streamed_ops():
        gpu = GpuRanks(
            make_gpu_config(), media_folder, quantization=quantization, kv_dtype=kv_dtype, block_size=8
        )
        actual = best_logprobs(gpu)
    assert_close(actual, expected, tolerance, f"{rand}")

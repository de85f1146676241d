"""Ranks of a checkpoint on disk, driven as the engine would, with the logits of every sampled row.

The counterpart of ranks.py for weights that go through workers/loader.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import ServerConfig
from engine.messages import MediaItem, StepPlan, StepResult
from engine.model_config import read_model_config
from tests.golden.cases import Case
from tests.workers.builders import Prompt
from tests.workers.ranks import BLOCK_SIZE, Driver, RankThreads
from workers.device.paddle import PaddleCpu
from workers.loader import load_weights
from workers.runner import Runner
from workers.sampler import Sampler


class LoadedRanks:
    """`world` runners of one checkpoint folder; stands in for ranks.Ranks."""

    def __init__(self, folder: Path, media_folder: Path, world: int = 1, **settings: Any) -> None:
        self.block_size, self.num_blocks = BLOCK_SIZE, 256
        self.media_folder = media_folder
        config = ServerConfig(model=str(folder), tensor_parallel_size=world, **settings)
        model = read_model_config(folder)
        self._threads = RankThreads(world)

        def make(device: PaddleCpu) -> Runner:
            return Runner(
                model,
                load_weights(config, model, device, device.rank, world),
                device,
                model.dtype,
                media_folder,
                num_blocks=self.num_blocks,
                block_size=self.block_size,
                num_token_ids=model.image_patch_id,  # as the reference, never generate a media id
            )

        self._runners = self._threads.run(make)
        self.driver = Driver(self)  # type: ignore[arg-type]

    def run(self, plan: StepPlan) -> StepResult:
        return self._threads.run(lambda device: self._runners[device.rank].run(plan))[0]


class LogitsRecorder:
    """Keeps what reaches the sampler: one [S, V] fp32 array per step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[np.ndarray] = []
        sample = Sampler.sample

        def record(sampler: Sampler, logits: Any, *arguments: Any) -> Any:
            self.steps.append(PaddleCpu().download(logits).copy())
            return sample(sampler, logits, *arguments)

        monkeypatch.setattr(Sampler, "sample", record)


def make_case_prompt(case: Case, folder: Path, num_tokens: int | None = None) -> Prompt:
    """The first `num_tokens` of a case (which end in no media item), its patches as files in `folder`."""
    end = len(case.token_ids) if num_tokens is None else num_tokens
    prompt = Prompt(token_ids=case.token_ids[:end].tolist())
    for index, item in enumerate(case.media):
        if item.offset + item.num_tokens > end:
            continue
        name = f"{case.name}-{index}"
        item.patches.tofile(folder / name)
        prompt.media.append(MediaItem(item.kind, name, item.grid, item.offset, item.num_tokens, name))
        prompt.patches.append(item.patches)
    return prompt


def prefill_rows(ranks: LoadedRanks, case: Case, rows: np.ndarray, recorder: LogitsRecorder) -> np.ndarray:
    """[R, V] logits of these rows, each as the last token of a prompt of its own, in one batch."""
    driver = ranks.driver
    seq_ids = [driver.add(make_case_prompt(case, ranks.media_folder, int(row) + 1)) for row in rows]
    recorder.steps.clear()
    driver.step({seq_id: driver.num_uncomputed(seq_id) for seq_id in seq_ids})
    for seq_id in seq_ids:
        driver.drop(seq_id)
    return recorder.steps[0]


def greedy_ids(ranks: LoadedRanks, case: Case, count: int) -> list[int]:
    seq_id = ranks.driver.add(make_case_prompt(case, ranks.media_folder))
    ranks.driver.generate([seq_id], count)
    ranks.driver.drop(seq_id)
    return ranks.driver.tokens(seq_id)

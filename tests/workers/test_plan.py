"""The planner's arithmetic against what ranks really allocate."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Literal

import pytest

from engine.config import ServerConfig
from engine.messages import Chunk, NewSequence, SamplingParams, StepPlan
from engine.model_config import read_model_config
from engine.plan import make_plan
from engine.plan_activations import step_bytes, vision_bytes
from engine.plan_checkpoint import decide_by_tensors
from engine.plan_machine import named_machine
from engine.settle import settle
from models.tiny import write_tiny_checkpoint
from tests.conftest import Rand
from tests.workers.builders import make_prompt
from tests.workers.checkpoints import load
from workers.device.base import BYTES_PER_ELEMENT
from workers.device.host import dtype_of
from workers.device.paddle import PaddleCpu
from workers.kv_cache import KvCache, blocks_that_fit
from workers.model.weights import resident_bytes
from workers.model.workspace import Workspace
from workers.parallel import share_of
from workers.runner import Runner


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(folder)
    return folder


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("quantization", ["bfloat16", "wint8", "wint4", "wint4-all"])
def test_predicted_bytes_are_the_allocated_ones(
    checkpoint: Path, quantization: str, world: int, kv_dtype: Literal["bfloat16", "int8"]
):
    given = ServerConfig(
        model=str(checkpoint),
        quantization=quantization,  # type: ignore[arg-type]
        tensor_parallel_size=world,
        dtype="bfloat16",
        kv_cache_memory=64 << 20,
        kv_cache_dtype=kv_dtype,
    )
    model = decide_by_tensors(read_model_config(checkpoint), checkpoint)
    config, _ = settle(given, model, checkpoint)
    plan = make_plan(config, model, named_machine("cpu-24g"))
    predicted = plan.weight_total + plan.num_blocks * plan.block_bytes

    rank = world - 1
    share = share_of(model, rank, world)
    weights = load(checkpoint, rank, world, quantization=quantization, dtype="bfloat16")
    kv = KvCache.allocate(
        PaddleCpu(), model, share, kv_dtype, blocks_that_fit(config, model, share, kv_dtype), 64
    )
    kv_bytes = sum(
        prod(tensor.shape) * BYTES_PER_ELEMENT[dtype_of(tensor)] for layer in kv.layers for tensor in layer
    )
    assert kv_bytes == plan.num_blocks * plan.block_bytes
    allocated = resident_bytes(weights) + kv_bytes
    assert allocated == pytest.approx(predicted, rel=0.02)
    assert resident_bytes(weights) == plan.weight_total  # without KV to hide in, to the byte


def buffer_bytes(workspaces: list[Workspace]) -> int:
    return sum(
        buffer.memory.shape[0] * BYTES_PER_ELEMENT[dtype]
        for workspace in workspaces
        for (_, dtype), buffer in workspace._buffers.items()
    )


def test_buffers_of_a_step_and_of_an_image_stay_under_their_bounds(
    checkpoint: Path, tmp_path: Path, rand: Rand, monkeypatch: pytest.MonkeyPatch
):
    made: list[Workspace] = []
    keep = Workspace.__init__
    monkeypatch.setattr(
        Workspace, "__init__", lambda self, device: (keep(self, device), made.append(self))[0]
    )
    peak = [0]
    monkeypatch.setattr(
        Workspace, "clear", lambda self: peak.append(buffer_bytes(made)) or self._buffers.clear()
    )
    model = decide_by_tensors(read_model_config(checkpoint), checkpoint)
    runner = Runner(
        model,
        load(checkpoint),
        PaddleCpu(),
        model.dtype,
        tmp_path,
        num_blocks=64,
        block_size=64,
    )
    prompt = make_prompt(rand, model, tmp_path, [40, (1, 32, 48), 60])
    tokens = len(prompt.token_ids)
    new = NewSequence(1, prompt.token_ids, tokens, SamplingParams(max_tokens=4), media=prompt.media)
    runner.run(StepPlan(0, [Chunk(1, tokens, list(range(-(-tokens // 64))), True)], [new]))
    predicted = step_bytes(model, 1, tokens, 1, model.dtype) + vision_bytes(model, 32 * 48, model.dtype)
    measured = max(peak) + buffer_bytes(made)  # the encoder's, given back since, and the decoder's
    assert predicted / 4 < measured <= predicted

"""A whole engine in one process: the real scheduler gives its plans to real ranks of a small model.

Between the two lies what `overlap` says: with it a plan is made before the result of the one before is known
to the scheduler, as in engine/loop.py. Sockets and processes are left out, so a step takes milliseconds.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from engine.config import ServerConfig
from engine.messages import AddRequest, RequestOutput, SamplingParams, StepPlan
from engine.model_config import ModelConfig
from engine.scheduler import Scheduler
from tests.engine.outputs import said_by
from tests.workers.builders import Prompt, RawWeights
from tests.workers.ranks import Ranks

CLIENT = b"api-0"
BLOCK_SIZE = 4
Bits = list[tuple[Any, ...]]  # of each token: its id, its log-probability, the likeliest ids and theirs


class InProcessEngine:
    """`options` are settings of ServerConfig, or num_host_blocks, or overlap."""

    def __init__(
        self, model: ModelConfig, raw: RawWeights, folder: Path, *, num_blocks: int = 512, **options: Any
    ) -> None:
        settings: dict[str, Any] = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": 64, "max_num_seqs": 8}
        self._overlap = options.pop("overlap", False)
        num_host_blocks = options.pop("num_host_blocks", 0)
        settings |= options
        settings["max_model_len"] = min(model.max_position_embeddings, num_blocks * settings["block_size"])
        self.config = ServerConfig(**settings)
        self.scheduler = Scheduler(self.config, num_blocks, [2], model.vocab_size, num_host_blocks)
        self.ranks = Ranks(
            model,
            raw,
            folder,
            world=self.config.tensor_parallel_size,
            num_blocks=num_blocks,
            block_size=self.config.block_size,
            image_cache=self.config.image_cache,
            num_host_blocks=num_host_blocks,
            kv_canary=True,
        )
        self.num_encoded_patches = self.num_steps = 0
        self.outputs: dict[str, list[RequestOutput]] = {}
        self._flights: deque[StepPlan] = deque()
        self._now = 1.0

    def ask(self, name: str, prompt: Prompt, sampling: SamplingParams) -> None:
        request = AddRequest(name, prompt.token_ids, sampling, prompt.media)
        is_taken = self.scheduler.add(CLIENT, request, self._now)
        assert is_taken, said_by(self.scheduler)

    def step(self) -> bool:
        """Plan once, then finish the oldest step if there may be no more; False when nothing is left."""
        self._now += 1.0
        if plan := self.scheduler.schedule(self._now):
            self._flights.append(plan)
            self.scheduler.tidy()
        had_work = bool(self._flights)
        if had_work and not (plan and self._overlap and len(self._flights) < 2):
            self._finish_step()
        self.scheduler.recount()
        return had_work

    def run_until_idle(self) -> None:
        while self.step():
            pass
        pool = self.scheduler.kv.pool
        assert pool.num_free == pool.num_blocks, "blocks are lost"

    def bits(self, name: str) -> Bits:
        """Everything a client sees of an answer."""
        outputs = self.outputs[name]
        tokens = [token for output in outputs for token in output.token_ids]
        logprobs = [one for output in outputs for one in output.logprobs]
        return [
            (token, one.logprob, *one.top_ids, *one.top_logprobs)
            for token, one in zip(tokens, logprobs, strict=True)
        ] + [(outputs[-1].finish_reason, outputs[-1].stop_token_id)]

    def _finish_step(self) -> None:
        result = self.ranks.run(self._flights.popleft())
        result = replace(result, compute_seconds=0.0, swap_seconds=0.0)  # else the clock would choose
        self.num_steps += 1
        self.num_encoded_patches += result.num_encoded_patches
        self.scheduler.apply(result, self._now)
        for output in said_by(self.scheduler):
            self.outputs.setdefault(output.request_id, []).append(output)

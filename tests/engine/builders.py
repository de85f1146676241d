"""The smallest worlds an engine test needs: a scheduler with tiny blocks, a fake clock and fake ranks."""

from __future__ import annotations

from collections import deque
from typing import Any

from engine.config import ServerConfig
from engine.messages import AddRequest, RequestOutput, SamplingParams, StepPlan, StepResult
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from tests.engine.fakes import RankMirror, chunks_of
from tests.engine.outputs import said_by

CLIENT = b"api-0"
EOS = 2


def make_config(**changes: Any) -> ServerConfig:
    """Sizes for tests: blocks of 4 tokens, steps of 16, a context of 64."""
    settings: dict[str, Any] = {
        "block_size": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        "max_num_seqs": 8,
    }
    return ServerConfig(**(settings | changes))


def make_request(request_id: str, prompt_len: int = 4, max_tokens: int = 4, **changes: Any) -> AddRequest:
    sampling = changes.pop("sampling", {})
    prompt = changes.pop("prompt", None) or [10 + i % 50 for i in range(prompt_len)]
    return AddRequest(request_id, prompt, SamplingParams(max_tokens=max_tokens, **sampling), **changes)


class SchedulerWorld:
    """A scheduler, the ranks it plans for, and everything it has said.

    With `overlap` each result is applied when the next step was planned and sent, one step late.
    """

    def __init__(self, num_blocks: int, vocab_size: int, num_host_blocks: int = 0, **config: Any) -> None:
        self.config = make_config(**config)
        self.scheduler = Scheduler(self.config, num_blocks, [EOS], vocab_size, num_host_blocks)
        self.ranks = RankMirror(num_blocks, self.config.block_size, vocab_size)
        self.ranks.num_host_blocks = num_host_blocks
        self.now = 100.0
        self.overlap = False
        self.outputs: dict[str, list[RequestOutput]] = {}
        self._late: deque[StepResult] = deque()  # of steps that have run and were not applied
        self._num_added = 0

    def add(self, prompt_len: int = 4, max_tokens: int = 4, **changes: Any) -> str:
        """Queue a request and return its id."""
        request_id = changes.pop("request_id", f"r{self._num_added}")
        self._num_added += 1
        self.scheduler.add(CLIENT, make_request(request_id, prompt_len, max_tokens, **changes), self.now)
        self._collect()
        return request_id

    def step(self) -> dict[str, int]:
        """One step of scheduler and ranks; returns the tokens planned per request."""
        planned = self.plan()
        if planned is None:
            return {}
        names = {sequence.seq_id: sequence.request_id for sequence in self.scheduler.running}
        self.run(planned)
        return {names[chunk.seq_id]: chunk.num_tokens for chunk in chunks_of(planned)}

    def plan(self) -> StepPlan | None:
        self.now += 1.0
        while (plan := self.scheduler.schedule(self.now)) is None and self._late:
            self.apply_oldest()
        if plan is None:
            self._collect()  # deadlines may have ended someone
        return plan

    def run(self, plan: StepPlan) -> None:
        self.scheduler.tidy()
        self._late.append(self.ranks.run(plan))
        while len(self._late) > self.overlap:
            self.apply_oldest()

    def apply_oldest(self) -> None:
        self.scheduler.apply(self._late.popleft(), self.now)
        self._collect()

    def run_until_idle(self, max_steps: int = 10_000) -> int:
        """Step until nothing is left to do; returns how many steps that took."""
        for count in range(max_steps):
            if (planned := self.plan()) is None:
                return count
            self.run(planned)
        raise AssertionError(f"still busy after {max_steps} steps")

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)
        self._collect()

    def sequence(self, request_id: str) -> Sequence:
        live = (*self.scheduler.running, *self.scheduler.waiting)
        return next(sequence for sequence in live if sequence.request_id == request_id)

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs.get(request_id, []) for token in output.token_ids]

    def last(self, request_id: str) -> RequestOutput:
        return self.outputs[request_id][-1]

    def recount(self) -> None:
        self.scheduler.recount()

    def assert_empty(self) -> None:
        """Nothing live, every block free, and the ranks remember nobody."""
        self.recount()
        pool = self.scheduler.kv.pool
        assert pool.num_free == pool.num_blocks
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.ranks.sequences == {}

    def _collect(self) -> None:
        for output in said_by(self.scheduler):
            self.outputs.setdefault(output.request_id, []).append(output)


def make_scheduler(num_blocks: int = 64, vocab_size: int = 10_000, **config: Any) -> SchedulerWorld:
    """`config` changes fields of make_config, or is num_host_blocks."""
    return SchedulerWorld(num_blocks, vocab_size, **config)

"""A quiet tenant beside a busy one: how long it waits for its first token, and what the busy one keeps."""

from __future__ import annotations

import random

import msgspec
import pytest

from engine.config import ServerConfig
from engine.messages import AddRequest, SamplingParams, StepPlan
from engine.scheduler import Scheduler
from engine.shares import share_out
from tests.engine.builders import CLIENT, EOS, make_scheduler
from tests.engine.fakes import RankMirror, chunks_of

VOCAB_SIZE = 50_000


def seconds_of(plan: StepPlan) -> float:
    """A made-up machine: 10 ms per step, 0.2 ms per prompt token, 0.1 ms per answer."""
    chunks = chunks_of(plan)
    num_prompt_tokens = sum(chunk.num_tokens for chunk in chunks if chunk.num_tokens > 1)
    return 0.01 + 0.0002 * num_prompt_tokens + 0.0001 * len(chunks)


class Clocked:
    """A scheduler whose steps take time; requests come when it is theirs."""

    def __init__(self, num_blocks: int, **config) -> None:
        settings = {"max_num_batched_tokens": 2048, "max_model_len": 8192, "max_num_seqs": 16, **config}
        self.scheduler = Scheduler(ServerConfig(**settings), num_blocks, [EOS], VOCAB_SIZE)
        self.ranks = RankMirror(num_blocks, 64, VOCAB_SIZE, check_slots=False)
        self.now = 1.0
        self.first_tokens: dict[str, float] = {}  # seconds after the arrival

    def play(self, requests: list[AddRequest]) -> None:
        coming = sorted(requests, key=lambda request: request.arrival)
        while coming or self.scheduler.num_running or self.scheduler.num_waiting:
            while coming and coming[0].arrival <= self.now:
                assert self.scheduler.add(CLIENT, coming.pop(0), self.now)
            self.step(until=coming[0].arrival if coming else self.now)
        self.scheduler.recount()

    def step(self, until: float) -> None:
        plan = self.scheduler.schedule(self.now)
        if plan is None:
            self.now = max(self.now, until)
            return
        seconds = seconds_of(plan)
        self.now += seconds
        result = msgspec.structs.replace(self.ranks.run(plan), compute_seconds=seconds)
        self.scheduler.apply(result, self.now)
        for sequence in self.scheduler.take_outbox().started:
            self.first_tokens[sequence.request_id] = self.now - sequence.arrival


def make_requests(tenant: str, count: int, begin: float, pause: float, prompt: int, answer: int):
    dice = random.Random(tenant)
    return [
        AddRequest(
            f"{tenant}-{i}",
            [dice.randrange(3, VOCAB_SIZE) for _ in range(dice.randint(prompt // 2, prompt))],
            SamplingParams(max_tokens=dice.randint(answer // 2, answer), ignore_eos=True),
            arrival=begin + pause * i,
            tenant=tenant,
        )
        for i in range(count)
    ]


def first_tokens_of(tenant: str, world: Clocked) -> list[float]:
    return sorted(seconds for name, seconds in world.first_tokens.items() if name.startswith(tenant))


@pytest.mark.parametrize("prompt", [200, 2000])
@pytest.mark.parametrize("num_blocks", [2000, 250])
def test_flood_of_another_tenant_at_most_doubles_the_time_to_the_first_token(num_blocks: int, prompt: int):
    calm = make_requests("calm", 40, begin=3.0, pause=0.7, prompt=prompt, answer=60)
    flood = make_requests("flood", 120, begin=1.0, pause=0.01, prompt=1500, answer=300)
    alone, beside = Clocked(num_blocks), Clocked(num_blocks)
    alone.play(calm)
    beside.play(calm + flood)
    expected, found = first_tokens_of("calm", alone), first_tokens_of("calm", beside)
    for share in (0.5, 0.95):
        index = int(len(expected) * share)
        assert found[index] <= 2 * expected[index], (
            f"p{100 * share:.0f} is {found[index]:.3f} s beside a flood, {expected[index]:.3f} s alone"
        )
    assert len(first_tokens_of("flood", beside)) == 120


def test_quiet_tenant_gets_a_place_at_once_and_the_busy_one_has_it_back_later():
    world = make_scheduler(max_num_seqs=4, num_blocks=64)
    flood = [world.add(prompt_len=4, max_tokens=12, tenant="flood") for _ in range(4)]
    world.step()
    calm = world.add(prompt_len=4, max_tokens=2, tenant="calm")
    assert calm in world.step()
    assert world.sequence(flood[3]).is_waiting and world.sequence(flood[3]).num_preemptions == 1
    world.run_until_idle()
    assert [len(world.tokens(one)) for one in flood] == [12] * 4
    world.assert_empty()


def test_nobody_loses_a_place_to_a_tenant_that_has_its_share():
    world = make_scheduler(max_num_seqs=4, num_blocks=64)
    for _ in range(6):
        world.add(prompt_len=4, max_tokens=12, tenant="one")
    world.step()
    for _ in range(6):
        world.add(prompt_len=4, max_tokens=12, tenant="two")
    world.step()
    assert sorted(one.tenant for one in world.scheduler.running) == ["one", "one", "two", "two"]
    assert world.scheduler.num_preemptions == 2
    world.step()
    assert world.scheduler.num_preemptions == 2


def test_urgent_request_keeps_its_place():
    world = make_scheduler(max_num_seqs=2, num_blocks=64)
    urgent = [world.add(prompt_len=4, max_tokens=9, tenant="flood", priority=-1) for _ in range(2)]
    world.step()
    world.add(prompt_len=4, max_tokens=2, tenant="calm")
    assert world.step() == dict.fromkeys(urgent, 1)


def test_one_tenant_alone_has_everything():
    world = make_scheduler(max_num_seqs=2, num_blocks=64, max_num_batched_tokens=64)
    for _ in range(3):
        world.add(prompt_len=40, max_tokens=9)
    assert list(world.step().values()) == [40, 24]
    assert world.scheduler.num_preemptions == 0


def test_what_is_short_is_shared_by_weight_and_what_one_does_not_want_goes_to_the_others():
    wants, weights = {"little": 10, "much": 500, "double": 500}, {"little": 1.0, "much": 1.0, "double": 2.0}
    assert share_out(310, wants, weights) == {"little": 10, "much": 100, "double": 200}
    assert share_out(2000, wants, weights) == wants
    assert share_out(100, {}, {}) == {}


def test_prompts_of_two_tenants_share_a_step():
    world = make_scheduler(max_num_batched_tokens=32, enable_prefix_caching=False, max_model_len=200)
    long = world.add(prompt_len=150, max_tokens=1, tenant="one")
    assert world.step() == {long: 32}
    other = world.add(prompt_len=60, max_tokens=1, tenant="two")
    assert world.step() == {long: 16, other: 16}

"""The step loop over a group and a gateway that only take notes: what is sent when, and who is told what."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import engine.loop
from engine.errors import EngineError
from engine.loop import StepLoop
from engine.media_files import MediaFiles
from engine.messages import AbortRequest, Ping, Pong, RequestOutput, StepPlan, StepResult
from engine.metrics import Metrics
from engine.outbox import StepOutputs
from tests.engine.builders import CLIENT, EOS, make_request, make_scheduler
from tests.engine.outputs import outputs_of


class Notes:
    """A worker group and a gateway at once; a step ends when the test calls `finish_step`."""

    def __init__(self, ranks: Any) -> None:
        self.ranks, self.failure, self.silence = ranks, None, ""
        self.events: list[Any] = []  # plans sent, outputs published, pongs, in order
        self.ponged = asyncio.Event()
        self.plans: asyncio.Queue[StepPlan] = asyncio.Queue()
        self.waits: list[float] = []  # how long the next plan was put off, at most
        self._answers: asyncio.Queue[StepResult | EngineError] = asyncio.Queue()

    def send(self, plan: StepPlan) -> None:
        self.events.append(plan)
        self.plans.put_nowait(plan)

    async def result(self) -> StepResult:
        answer = await self._answers.get()
        if isinstance(answer, EngineError):
            raise answer
        return answer

    async def has_result(self, seconds: float) -> bool:
        self.waits.append(seconds)
        await asyncio.sleep(0)
        return not self._answers.empty()

    def finish_step(self, plan: StepPlan) -> None:
        self._answers.put_nowait(self.ranks.run(plan))

    def fail(self, sentence: str) -> None:
        self.failure = EngineError(sentence)
        self._answers.put_nowait(self.failure)

    def describe_silence(self) -> str:
        return self.silence

    def publish(self, step: StepOutputs) -> None:
        self.events += outputs_of(step)

    def answer(self, client: bytes, pong: Pong) -> None:
        self.events.append(pong)
        self.ponged.set()


def play(story: Callable[[StepLoop, Notes], Awaitable[None]], overlap: bool = False) -> Notes:
    """Run the loop beside `story`, which ends by stopping or failing it."""
    world = make_scheduler()
    notes = Notes(world.ranks)
    media = MediaFiles(Path("/nowhere"), 588)
    steps = StepLoop(world.scheduler, notes, notes, Metrics(), media, overlap)  # type: ignore

    async def both() -> None:
        running = asyncio.create_task(steps.run())
        await asyncio.wait_for(story(steps, notes), 10)
        await asyncio.wait_for(asyncio.gather(running, return_exceptions=True), 10)

    asyncio.run(both())
    return notes


def test_outputs_of_a_step_are_published_while_the_next_one_runs():
    async def story(steps: StepLoop, notes: Notes) -> None:
        steps.on_request(CLIENT, make_request("r", max_tokens=2))
        notes.finish_step(await notes.plans.get())
        second = await notes.plans.get()
        steps.stop()
        notes.finish_step(second)

    events = play(story).events
    assert [type(event) for event in events] == [StepPlan, StepPlan, RequestOutput, RequestOutput]
    assert [output.finish_reason for output in events[2:]] == [None, "length"]


def test_an_idle_engine_answers_a_ping_after_a_probe_of_the_ranks():
    async def story(steps: StepLoop, notes: Notes) -> None:
        steps.on_request(CLIENT, Ping(5))
        probe = await notes.plans.get()
        assert probe.chunks == []
        notes.finish_step(probe)
        await notes.ponged.wait()
        steps.on_request(CLIENT, Ping(6))  # the probe just ended: proof enough
        steps.stop()

    events = play(story).events
    assert events[1:] == [Pong(5, True, "serving"), Pong(6, True, "serving")]


@pytest.mark.parametrize("silence", ["", "no sign of life from rank 1"])
def test_a_ping_during_a_long_step_is_answered_from_the_heartbeats(monkeypatch, silence):
    monkeypatch.setattr(engine.loop, "_PING_PATIENCE", 0.01)

    async def story(steps: StepLoop, notes: Notes) -> None:
        notes.silence = silence
        steps.on_request(CLIENT, make_request("r", max_tokens=1))
        plan = await notes.plans.get()
        steps.on_request(CLIENT, Ping(1))
        await notes.ponged.wait()
        steps.stop()
        notes.finish_step(plan)

    assert play(story).events[1] == Pong(1, not silence, silence or "a long step is running")


def test_an_abort_during_a_step_needs_no_further_plan_but_the_farewell():
    async def story(steps: StepLoop, notes: Notes) -> None:
        steps.on_request(CLIENT, make_request("r", max_tokens=9))
        plan = await notes.plans.get()
        steps.on_request(CLIENT, AbortRequest("r"))
        notes.finish_step(plan)
        farewell = await notes.plans.get()
        assert (farewell.chunks, farewell.dropped) == ([], [0])
        notes.finish_step(farewell)
        steps.stop()

    assert play(story).events[2].finish_reason == "abort"


def test_a_failure_while_idle_ends_the_loop():
    async def story(steps: StepLoop, notes: Notes) -> None:
        await asyncio.sleep(0)
        notes.fail("rank 1 ended")
        steps.wake()

    assert play(story).events == []


def test_stopping_ends_open_requests_with_an_error():
    async def story(steps: StepLoop, notes: Notes) -> None:
        steps.on_request(CLIENT, make_request("r", max_tokens=9))
        plan = await notes.plans.get()
        steps.stop()
        notes.finish_step(plan)

    last = play(story).events[-1]
    assert (last.finish_reason, last.error, last.error_status) == (
        "error",
        "The server is shutting down.",
        503,
    )


# two steps on their way


def endings(events: list[Any]) -> list[str | None]:
    return [event.finish_reason for event in events if isinstance(event, RequestOutput)]


def test_overlap_sends_a_second_step_while_the_first_runs_and_never_a_third():
    async def story(steps: StepLoop, notes: Notes) -> None:
        steps.on_request(CLIENT, make_request("r", max_tokens=4))
        first, second = await notes.plans.get(), await notes.plans.get()
        for _ in range(10):
            await asyncio.sleep(0)
        assert notes.plans.empty()
        notes.finish_step(first)
        third = await notes.plans.get()
        assert [plan.step for plan in (first, second, third)] == [1, 2, 3]
        steps.stop()
        notes.finish_step(second)
        notes.finish_step(third)

    events = play(story, overlap=True).events
    assert [type(event) for event in events[:3]] == [StepPlan, StepPlan, StepPlan], "outputs wait for no rank"


def test_overlap_plans_the_second_step_shortly_before_the_first_is_expected_to_end():
    async def story(steps: StepLoop, notes: Notes) -> None:
        notes.ranks.compute_seconds = 10.0
        steps.on_request(CLIENT, make_request("r", max_tokens=9))
        for _ in range(5):
            notes.finish_step(await notes.plans.get())
        sixth, seventh = await notes.plans.get(), await notes.plans.get()
        steps.stop()
        notes.finish_step(sixth)
        notes.finish_step(seventh)

    (*_, wait) = play(story, overlap=True).waits
    assert 8.0 < wait < 9.0


def test_overlap_knows_an_end_by_length_before_it_comes():
    async def story(steps: StepLoop, notes: Notes) -> None:
        steps.on_request(CLIENT, make_request("r", max_tokens=2))
        first, second = await notes.plans.get(), await notes.plans.get()
        notes.finish_step(first)
        notes.finish_step(second)
        farewell = await notes.plans.get()
        assert not farewell.has_work
        notes.finish_step(farewell)
        steps.stop()

    assert endings(play(story, overlap=True).events) == [None, "length"]


def test_overlap_drops_the_token_behind_a_stop_token():
    async def story(steps: StepLoop, notes: Notes) -> None:
        notes.ranks.next_token = lambda sequence: EOS
        steps.on_request(CLIENT, make_request("r", max_tokens=9))
        first, wasted = await notes.plans.get(), await notes.plans.get()
        notes.finish_step(first)
        notes.finish_step(wasted)
        farewell = await notes.plans.get()
        assert not farewell.has_work
        notes.finish_step(farewell)
        steps.stop()

    outputs = [event for event in play(story, overlap=True).events if isinstance(event, RequestOutput)]
    assert [(output.token_ids, output.stop_token_id) for output in outputs] == [([], EOS)]


def test_stopping_delivers_the_tokens_of_both_steps_in_flight():
    async def story(steps: StepLoop, notes: Notes) -> None:
        steps.on_request(CLIENT, make_request("r", max_tokens=9))
        first, second = await notes.plans.get(), await notes.plans.get()
        steps.stop()
        notes.finish_step(first)
        notes.finish_step(second)

    assert endings(play(story, overlap=True).events)[-3:] == [None, None, "error"]


def test_failing_with_two_steps_in_flight_ends_every_request_once():
    async def story(steps: StepLoop, notes: Notes) -> None:
        for name in "ab":
            steps.on_request(CLIENT, make_request(name, max_tokens=9))
        await notes.plans.get()
        await notes.plans.get()
        notes.fail("rank 1 ended")

    events = play(story, overlap=True).events
    assert endings(events) == ["error", "error"]
    assert {event.error for event in events[2:]} == {"The engine failed: rank 1 ended."}


def test_abort_with_two_steps_in_flight_drops_what_they_say_of_it():
    async def story(steps: StepLoop, notes: Notes) -> None:
        for name in "ab":
            steps.on_request(CLIENT, make_request(name, max_tokens=3))
        first, second = await notes.plans.get(), await notes.plans.get()
        steps.on_request(CLIENT, AbortRequest("a"))
        notes.finish_step(first)
        third = await notes.plans.get()
        assert third.dropped == [0]
        notes.finish_step(second)
        notes.finish_step(third)
        notes.finish_step(await notes.plans.get())
        steps.stop()

    outputs = [event for event in play(story, overlap=True).events if isinstance(event, RequestOutput)]
    assert [output.finish_reason for output in outputs if output.request_id == "a"] == ["abort"]
    assert [output.finish_reason for output in outputs if output.request_id == "b"] == [None, None, "length"]


def test_ping_is_answered_by_the_first_of_two_steps_that_ends():
    async def story(steps: StepLoop, notes: Notes) -> None:
        steps.on_request(CLIENT, make_request("r", max_tokens=9))
        first, second = await notes.plans.get(), await notes.plans.get()
        steps.on_request(CLIENT, Ping(1))
        notes.finish_step(first)
        await notes.ponged.wait()
        steps.stop()
        notes.finish_step(second)
        notes.finish_step(await notes.plans.get())

    assert Pong(1, True, "serving") in play(story, overlap=True).events


def test_deadline_ends_a_request_with_two_steps_in_flight():
    async def story(steps: StepLoop, notes: Notes) -> None:
        request = make_request("r", max_tokens=9, arrival=time.monotonic(), timeout=0.05)
        steps.on_request(CLIENT, request)
        first, second = await notes.plans.get(), await notes.plans.get()
        await asyncio.sleep(0.06)
        notes.finish_step(first)
        farewell = await notes.plans.get()
        assert (farewell.has_work, farewell.dropped) == (False, [0])
        notes.finish_step(second)
        notes.finish_step(farewell)
        steps.stop()

    assert endings(play(story, overlap=True).events) == [None, "length"]

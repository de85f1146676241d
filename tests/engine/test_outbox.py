"""How what a step said is put together for each api process."""

from __future__ import annotations

from engine.messages import RequestOutput, TokenLogprobs
from engine.outbox import Decoded, Outbox, StepOutputs
from tests.engine.builders import CLIENT, SchedulerWorld, make_request, make_scheduler

OTHER = b"api-1"


def running_world(*clients: bytes) -> SchedulerWorld:
    """Requests r0, r1, ..., one for each client, about to decode."""
    world = make_scheduler()
    for number, client in enumerate(clients):
        world.scheduler.add(client, make_request(f"r{number}", max_tokens=9), world.now)
    world.step()
    world.scheduler.take_outbox()
    return world


def decoded(world: SchedulerWorld, tokens: list[int], *ended: int, **logprobs: TokenLogprobs) -> Decoded:
    """A token for each, in the order of the requests; logprobs by request."""
    running = world.scheduler.running
    ids = [one.request_id for one in running]
    rows = {ids.index(name): value for name, value in logprobs.items()}
    clients = frozenset(one.client for one in running)
    return Decoded(running, ids, clients, tokens, rows, frozenset(ended))


def test_a_step_of_decodes_is_two_columns():
    world = running_world(CLIENT, CLIENT)
    outbox = Outbox()
    outbox.add_decoded(decoded(world, [7, 8]))
    assert outbox.steps() == [StepOutputs(CLIENT, ["r0", "r1"], [7, 8])]


def test_each_api_process_hears_only_of_its_own_requests():
    world = running_world(CLIENT, OTHER, CLIENT)
    outbox = Outbox()
    outbox.add_decoded(decoded(world, [7, 8, 9]))
    steps = {step.client: step for step in outbox.steps()}
    assert steps == {
        CLIENT: StepOutputs(CLIENT, ["r0", "r2"], [7, 9]),
        OTHER: StepOutputs(OTHER, ["r1"], [8]),
    }


def test_one_who_ended_or_asked_for_logprobs_is_in_no_column():
    world = running_world(CLIENT, CLIENT, CLIENT)
    first, second = TokenLogprobs(-0.5), TokenLogprobs(-1.5)
    outbox = Outbox()
    outbox.add_decoded(decoded(world, [7, 8, 9], 1, r0=first, r1=second))
    last = RequestOutput("r1", [8], [second], "length")
    outbox.add(CLIENT, last)
    assert outbox.steps() == [
        StepOutputs(CLIENT, ["r2"], [9], [RequestOutput("r0", [7], [first]), last]),
    ]


def test_what_came_before_a_step_of_decodes_is_not_said_after_it():
    world = running_world(CLIENT)
    outbox = Outbox()
    first = RequestOutput("r1", [5])
    outbox.add(CLIENT, first)
    for token in (7, 8):
        outbox.add_decoded(decoded(world, [token]))
    outbox.add(CLIENT, RequestOutput("r0", finish_reason="abort"))
    assert outbox.steps() == [
        StepOutputs(CLIENT, outputs=[first]),
        StepOutputs(CLIENT, ["r0"], [7]),
        StepOutputs(CLIENT, ["r0"], [8], [RequestOutput("r0", finish_reason="abort")]),
    ]

"""What the scheduler said, as one output after the other."""

from __future__ import annotations

from engine.messages import RequestOutput, TokenBatch
from engine.outbox import StepOutputs
from engine.scheduler import Scheduler


def outputs_of(step: StepOutputs | TokenBatch) -> list[RequestOutput]:
    """The columns first, as the api reads them."""
    decoded = zip(step.decoded, step.token_ids, strict=True)
    return [RequestOutput(request_id, [token]) for request_id, token in decoded] + step.outputs


def said_by(scheduler: Scheduler) -> list[RequestOutput]:
    """Everything since the last call, to whomever it was said."""
    return [output for step in scheduler.take_outbox().steps() for output in outputs_of(step)]

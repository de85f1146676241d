"""What the scheduler has to tell the world since it was last asked: outputs, beginnings and ends.

Outputs of decodes are kept as they come, a list of sequences and one of tokens, and become messages when
someone asks: the ranks compute meanwhile, while they wait for whoever applies a result.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from engine.messages import RequestOutput, TokenLogprobs
from engine.sequence import Sequence

Client = bytes


@dataclass(frozen=True, slots=True)
class Decoded:
    """One token of each of many sequences."""

    sequences: list[Sequence]
    request_ids: list[str]  # of the sequences
    clients: frozenset[Client]  # of the sequences; one may have none any more
    tokens: list[int]
    logprobs: dict[int, TokenLogprobs]  # by row, of those who asked
    ended: frozenset[int]  # rows with an output of their own


@dataclass(slots=True)
class StepOutputs:
    """What one api process hears of one step: the columns first, then the outputs."""

    client: Client
    decoded: list[str] = field(default_factory=list)  # requests with one further token and nothing else
    token_ids: list[int] = field(default_factory=list)  # of each of `decoded`
    outputs: list[RequestOutput] = field(default_factory=list)


@dataclass(slots=True)
class Outbox:
    started: list[Sequence] = field(default_factory=list)  # got their first token
    finished: list[Sequence] = field(default_factory=list)  # whatever the reason
    refused: list[int] = field(default_factory=list)  # HTTP statuses of requests that were not taken
    num_generated_tokens: int = 0
    preemptions: Counter[str] = field(default_factory=Counter)  # by reason: "older", "itself", "share"
    _said: list[tuple[Client, RequestOutput] | Decoded] = field(default_factory=list)  # in order

    def add(self, client: Client, output: RequestOutput) -> None:
        self._said.append((client, output))

    def add_decoded(self, decoded: Decoded) -> None:
        self._said.append(decoded)

    def steps(self) -> list[StepOutputs]:
        """Everything said, in order; made anew at every call."""
        steps: list[StepOutputs] = []
        latest: dict[Client, StepOutputs] = {}
        for one in self._said:
            if isinstance(one, Decoded):
                for step in _steps_of(one):
                    latest[step.client] = step
                    steps.append(step)
                continue
            client, output = one
            if client not in latest:
                latest[client] = StepOutputs(client)
                steps.append(latest[client])
            latest[client].outputs.append(output)
        return steps


def _steps_of(decoded: Decoded) -> list[StepOutputs]:
    """One per client. Those who ended say so themselves; logprobs need an output."""
    if len(decoded.clients) == 1 and not decoded.ended and not decoded.logprobs:
        (client,) = decoded.clients
        return [StepOutputs(client, decoded.request_ids, decoded.tokens)]
    steps: dict[Client, StepOutputs] = {}
    for row, (sequence, token) in enumerate(zip(decoded.sequences, decoded.tokens, strict=True)):
        if row in decoded.ended:
            continue
        step = steps.setdefault(sequence.client, StepOutputs(sequence.client))
        if logprobs := decoded.logprobs.get(row):
            step.outputs.append(RequestOutput(sequence.request_id, [token], [logprobs]))
        else:
            step.decoded.append(sequence.request_id)
            step.token_ids.append(token)
    return list(steps.values())

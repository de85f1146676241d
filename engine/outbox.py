"""What the scheduler has to tell the world since it was last asked: outputs, beginnings and ends.

Outputs of decodes are kept as they come, a list of sequences and one of tokens, and become messages when
someone asks: the ranks compute meanwhile, while they wait for whoever applies a result.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from engine.messages import RequestOutput, TokenLogprobs
from engine.sequence import Sequence

Client = bytes


@dataclass(frozen=True, slots=True)
class Decoded:
    """One token of each of many sequences."""

    sequences: list[Sequence]
    tokens: list[int]
    logprobs: dict[int, TokenLogprobs]  # by row, of those who asked
    ended: frozenset[int]  # rows with an output of their own


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

    @property
    def outputs(self) -> dict[Client, list[RequestOutput]]:
        """Everything said, in order, per api process; made anew at every call."""
        outputs: dict[Client, list[RequestOutput]] = defaultdict(list)
        for one in self._said:
            if isinstance(one, Decoded):
                _add_decoded(outputs, one)
            else:
                outputs[one[0]].append(one[1])
        return outputs


def _add_decoded(outputs: dict[Client, list[RequestOutput]], decoded: Decoded) -> None:
    if decoded.ended or decoded.logprobs:
        for row, (sequence, token) in enumerate(zip(decoded.sequences, decoded.tokens, strict=True)):
            if row not in decoded.ended:
                logprobs = decoded.logprobs.get(row)
                output = RequestOutput(sequence.request_id, [token], [logprobs] if logprobs else [])
                outputs[sequence.client].append(output)
        return
    for sequence, token in zip(decoded.sequences, decoded.tokens, strict=True):
        outputs[sequence.client].append(RequestOutput(sequence.request_id, [token]))

"""One request as the engine knows it while it lives: its tokens, its blocks, where it stands.

All state of a request is here, so the ranks can be given it again from nothing (preemption, a restarted
worker). What to do with sequences is scheduler.py's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from engine.messages import MediaItem, NewSequence, SamplingParams, Timings


class Status(IntEnum):
    WAITING = 0  # holds no blocks; new, or preempted
    RUNNING = 1
    FINISHED = 2


@dataclass(slots=True, eq=False)
class Rounds:
    """How many tokens each member of the decode batch has computed since the batch exists: counted once for
    all, as writing a number into hundreds of sequences would be most of what a step costs.
    """

    count: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens chasing each other: `num_computed_tokens` have KV, `num_tokens` exist.

    # [0, applied)          KV is in `block_ids`
    # [applied, computed)   will be when the steps in flight were applied
    # [computed, total)     to compute; one token while decoding
    # [known, total)        sampled by a step in flight: exists, but here nobody knows its value yet
    """

    seq_id: int  # the ranks' name for it; never reused
    request_id: str
    client: bytes  # identity of the api process that gets the outputs
    token_ids: list[int]  # the prompt, then the output
    num_prompt_tokens: int
    max_num_tokens: int  # prompt and output at most; reaching it finishes with "length"
    stop_token_ids: frozenset[int]  # the model's end tokens, unless ignored, and the request's own
    sampling: SamplingParams
    media: list[MediaItem] = field(default_factory=list)
    priority: int = 0
    arrival: float = 0.0  # monotonic seconds, as every time here
    tenant: str = ""
    cache_salt: str = ""  # prefixes are shared only among equal ones
    deadline: float = 0.0  # when it has to end; 0.0: never

    status: Status = Status.WAITING
    num_filled_tokens: int = 0  # of them by steps that were applied, until `is_filled`
    is_filled: bool = False  # a token was sampled and applied since it last began to run
    num_cached_tokens: int = 0  # of them, found in the prefix cache when first admitted
    block_ids: list[int] = field(default_factory=list)
    num_slots: int = 0  # len(block_ids) * block_size: tokens that fit without a new block
    horizon: int = 0  # computed tokens up to which a decode needs no look: it has a slot, and is not the last
    block_keys: list[Any] = field(default_factory=list)  # prefix_cache.BlockKey of each full block so far
    num_remembered: int = 0  # blocks that the prefix cache was told of
    num_preemptions: int = 0
    num_tokens_at_preemption: int = 0  # of the last one; more means progress
    num_tokens_at_admission: int = 0  # computed, that is cached, when it last began to run
    seniority: int = 0  # which number in the order of first admissions
    num_overtaken: int = 0  # times that someone behind it in the queue was admitted instead
    waits_for: str = ""  # why it was passed over last
    tried_at: int = -1  # BlockPool.num_freed when it last did not fit
    num_charged_tokens: int = 0  # paid for by its tenant
    finish_reason: str = ""
    first_scheduled: float = 0.0  # 0.0: not yet
    first_token: float = 0.0
    last_token: float = 0.0  # set at the end
    preempted_at: float = 0.0  # when it last lost its blocks
    preempted_seconds: float = 0.0  # that it waited for its return, altogether
    encode_seconds: float = 0.0  # of steps that encoded media of its own
    _computed: int = 0  # num_computed_tokens, less those that `_rounds` counts
    _rounds: Rounds | None = None  # of the decode batch, while it is in it

    @property
    def num_computed_tokens(self) -> int:
        """By steps that were planned, the steps in flight included."""
        rounds = self._rounds
        return self._computed if rounds is None else self._computed + rounds.count

    @num_computed_tokens.setter
    def num_computed_tokens(self, count: int) -> None:
        self._computed = count if self._rounds is None else count - self._rounds.count

    @property
    def is_decoding(self) -> bool:
        """It is in the decode batch: every step computes one token of it."""
        return self._rounds is not None

    def follow(self, rounds: Rounds | None) -> None:
        """From now on it computes a token in each of `rounds`; None: no more."""
        count = self.num_computed_tokens
        self._rounds = rounds
        self.num_computed_tokens = count

    @property
    def num_tokens(self) -> int:
        """Known and in flight; a step that computes the last one samples another."""
        return max(len(self.token_ids), self.num_computed_tokens + 1)

    @property
    def num_applied_tokens(self) -> int:
        """Whose KV is surely in the blocks: others may rely on it."""
        return len(self.token_ids) - 1 if self.is_filled else self.num_filled_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def has_all_tokens(self) -> bool:
        """No more may be computed: its last token is in flight."""
        return self.num_computed_tokens + 1 >= self.max_num_tokens

    @property
    def must_advance(self) -> bool:
        """It was preempted and has not made a token since: its turn, not another preemption."""
        return self.num_tokens <= self.num_tokens_at_preemption

    @property
    def timings(self) -> Timings:
        """Where the time went; at the end."""
        return Timings(
            queue_seconds=self.first_scheduled - self.arrival,
            prefill_seconds=self.first_token - self.first_scheduled,
            decode_seconds=self.last_token - self.first_token,
            encode_seconds=self.encode_seconds,
            preempted_seconds=self.preempted_seconds,
        )

    @property
    def is_waiting(self) -> bool:
        return self.status is Status.WAITING

    @property
    def is_running(self) -> bool:
        return self.status is Status.RUNNING

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED

    def to_message(self) -> NewSequence:
        """Everything a rank needs to know it from scratch."""
        return NewSequence(
            seq_id=self.seq_id,
            token_ids=self.token_ids,
            num_prompt_tokens=self.num_prompt_tokens,
            sampling=self.sampling,
            media=self.media,
            num_computed_tokens=self.num_computed_tokens,
        )

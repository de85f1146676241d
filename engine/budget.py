"""How much one step may do: tokens in total and for prompts, media encoded, sequences running at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.config import ServerConfig
from engine.messages import MediaItem
from engine.sequence import Sequence


@dataclass(slots=True)
class StepBudget:
    """What is left of a step while it is being planned."""

    num_tokens: int
    num_admissions: int  # sequences that may still start running
    can_chunk: bool  # False: a prompt is computed whole or not at all
    num_prefill_tokens: int  # of `num_tokens`, for more than one token of a sequence
    num_encoder_tokens: int  # of media whose encoding begins in this step
    has_encoded: bool = False  # one item may always be, however large
    quotas: dict[str, int] = field(default_factory=dict)  # prompt tokens by tenant, where tenants contend

    @classmethod
    def from_config(
        cls, config: ServerConfig, num_running: int, num_prefill_tokens: int | None = None
    ) -> StepBudget:
        return cls(
            num_tokens=config.max_num_batched_tokens,
            num_admissions=min(config.max_num_seqs, config.max_num_batched_tokens) - num_running,
            can_chunk=config.enable_chunked_prefill,
            num_prefill_tokens=num_prefill_tokens or config.max_num_batched_tokens,
            num_encoder_tokens=config.max_encoder_tokens_per_step,
        )

    def chunk_of(self, num_tokens: int, kept_back: int = 0) -> int:
        """How many of `num_tokens` fit when `kept_back` tokens stay reserved for others; 0 if none."""
        room = self.num_tokens - kept_back
        if not self.can_chunk:
            return num_tokens if num_tokens <= room else 0
        if num_tokens > 1:
            room = min(room, self.num_prefill_tokens)
        return max(0, min(num_tokens, room))

    def next_chunk(self, sequence: Sequence, begin: int, kept_back: int = 0) -> int:
        """How many tokens from index `begin` on `sequence` may compute now; 0 if none."""
        wanted = sequence.num_tokens - begin
        if sequence.tenant in self.quotas:
            wanted = min(wanted, max(0, self.quotas[sequence.tenant]))
        num_tokens = self.chunk_of(wanted, kept_back)
        if num_tokens and sequence.media and self.can_chunk:
            return self._end_before_media(sequence, begin, begin + num_tokens) - begin
        return num_tokens

    def take(self, sequence: Sequence, begin: int, num_tokens: int) -> bool:
        """A chunk was planned; returns whether it has something encoded."""
        self.num_tokens -= num_tokens
        if num_tokens > 1:
            self.num_prefill_tokens -= num_tokens
        if sequence.tenant in self.quotas:
            self.quotas[sequence.tenant] -= num_tokens
        if not sequence.media:
            return False
        end = begin + num_tokens
        cost = sum(_encoder_tokens(sequence, item, begin, end) for item in sequence.media)
        self.num_encoder_tokens -= cost
        self.has_encoded = self.has_encoded or cost > 0
        return cost > 0

    def _end_before_media(self, sequence: Sequence, begin: int, end: int) -> int:
        """`end`, or where the first item begins that is too much for the encoder in this step."""
        left, has_encoded = self.num_encoder_tokens, self.has_encoded
        for item in sequence.media:
            cost = _encoder_tokens(sequence, item, begin, end)
            if cost > left:
                if item.kind == "video" and left > 0:
                    return max(item.offset, begin) + left
                if has_encoded:
                    return max(item.offset, begin)
            has_encoded = has_encoded or cost > 0
            left -= cost
        return end


def _encoder_tokens(sequence: Sequence, item: MediaItem, begin: int, end: int) -> int:
    """Tokens of `item` that a chunk [begin, end) has to have encoded.

    An image is encoded whole when its first token is computed, and kept until its last one is. A video is
    encoded in groups of frames as the chunks reach them.
    """
    first, last = max(item.offset, begin), min(item.offset + item.num_tokens, end)
    if first >= last:
        return 0
    if item.kind == "video":
        return last - first
    return item.num_tokens if item.offset >= begin or begin == sequence.num_tokens_at_admission else 0

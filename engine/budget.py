"""How much one step may do: tokens computed in total, and sequences running at once."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import ServerConfig


@dataclass(slots=True)
class StepBudget:
    """What is left of a step while it is being planned."""

    num_tokens: int
    num_admissions: int  # sequences that may still start running
    can_chunk: bool  # False: a prompt is computed whole or not at all

    @classmethod
    def from_config(cls, config: ServerConfig, num_running: int) -> StepBudget:
        return cls(
            config.max_num_batched_tokens, config.max_num_seqs - num_running, config.enable_chunked_prefill
        )

    def chunk_of(self, num_tokens: int, kept_back: int = 0) -> int:
        """How many of `num_tokens` fit when `kept_back` tokens stay reserved for others; 0 if none."""
        room = self.num_tokens - kept_back
        if num_tokens <= room:
            return num_tokens
        return max(0, room) if self.can_chunk else 0

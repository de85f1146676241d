"""How many prompt tokens a step may compute beside running answers, so that these do not stall.

Learned from the times of the steps: what a step of decodes alone takes, and what a prompt token adds to it.
"""

from __future__ import annotations

_NEW = 0.2  # weight of the newest step in the running means
_FEWEST = 16  # prompt tokens of a step, whatever the target: else a prompt would never end
_TARGET = 0.2  # seconds, for `num_tokens_within` where there is no target
_TELLING = 16  # a step with fewer prompt tokens says little about what one costs


class Pacing:
    """`target` seconds from token to token (0: no bound), `at_most` prompt tokens in any step."""

    def __init__(self, target: float, at_most: int) -> None:
        self.target = target
        self.at_most = at_most
        self.decode_seconds = 0.0  # of a step without prompts
        self.token_seconds = 0.0  # that a prompt token adds; 0.0: not known yet

    @property
    def num_prefill_tokens(self) -> int:
        """For a step beside decodes. When these alone miss the target, prompts get as long again."""
        if not self.target or not self.token_seconds:
            return self.at_most
        allowed = max(self.target - self.decode_seconds, self.decode_seconds)
        return max(_FEWEST, min(self.at_most, int(allowed / self.token_seconds)))

    def num_tokens_within(self, part: float) -> int:
        """For a step as short as `part` of the target; at least half as long again as decodes."""
        if not self.token_seconds:
            return self.at_most
        allowed = max(part * (self.target or _TARGET) - self.decode_seconds, self.decode_seconds / 2)
        return max(_FEWEST, min(self.at_most, int(allowed / self.token_seconds)))

    def observe(self, seconds: float, num_prefill_tokens: int) -> None:
        """A step with decodes, prompts or both took `seconds` of computing."""
        if seconds <= 0.0:
            return
        if not num_prefill_tokens:
            self.decode_seconds = _mean(self.decode_seconds, seconds)
        elif num_prefill_tokens >= _TELLING:
            added = max(0.0, seconds - self.decode_seconds) / num_prefill_tokens
            self.token_seconds = _mean(self.token_seconds, added)


def _mean(old: float, new: float) -> float:
    return old + _NEW * (new - old) if old else new

"""How often each skill is drawn: shares of the main diet, and of the short first stage before it.

A stage is chosen by the number of samples drawn so far and by nothing else, so a run can be repeated.
"""

from __future__ import annotations

from models.demo_training.skills import SKILLS

# Harder skills and those with the widest range of answers get more.
SHARES: dict[str, float] = {
    "shapes": 8, "counts": 10, "positions": 7, "sizes": 4, "digits": 12, "words": 14, "pictures": 8,
    "motion": 4, "flashes": 6, "colour_order": 4, "moment": 6, "chat": 2, "refusal": 3, "arithmetic": 6,
    "repeat": 5, "thinking": 4, "tools": 6, "json": 5,
}  # fmt: skip
assert SHARES.keys() == SKILLS.keys()

# At first, what teaches the tower to see and the decoder to write; clips cost five times as much as pictures.
FIRST_STAGE_SAMPLES = 40_000
FIRST_SHARES: dict[str, float] = SHARES | {
    "shapes": 30, "digits": 20, "counts": 10, "pictures": 4,
    "flashes": 1, "moment": 1, "colour_order": 2, "motion": 2,
}  # fmt: skip


def shares_at(num_samples: int, only: tuple[str, ...] = ()) -> dict[str, float]:
    """Shares after so many samples; `only` keeps the named skills (for trials)."""
    shares = FIRST_SHARES if num_samples < FIRST_STAGE_SAMPLES else SHARES
    return {skill: share for skill, share in shares.items() if not only or skill in only}

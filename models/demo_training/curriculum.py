"""How often each skill is drawn: one easy question, easy first looks, mostly seeing, then the whole diet.

A stage is chosen by the number of the step and by nothing else, so a run can be repeated.
"""

from __future__ import annotations

from models.demo_training.skills import FIRST_LOOKS, SKILLS, Skill

# Harder skills and those with the widest range of answers get more.
SHARES: dict[str, float] = {
    "shapes": 8,
    "counts": 10,
    "positions": 7,
    "sizes": 4,
    "digits": 12,
    "words": 14,
    "pictures": 8,
    "motion": 4,
    "flashes": 6,
    "colour_order": 4,
    "moment": 6,
    "chat": 2,
    "refusal": 3,
    "arithmetic": 6,
    "repeat": 5,
    "thinking": 4,
    "tools": 6,
    "json": 5,
}
assert SHARES.keys() == SKILLS.keys()

# Clips cost five times as much as pictures and teach the tower no more.
SEEING_SHARES = SHARES | {"shapes": 30, "digits": 20, "flashes": 1, "moment": 1, "motion": 2}

# (steps, shares) of the stages before the whole diet. The first has one question only: see first_looks.py.
STAGES: tuple[tuple[int, dict[str, float]], ...] = (
    (100, {"first colour": 1}),
    (200, {"first thing": 60, "first digit": 25, "shapes": 10, "chat": 5}),
    (400, SEEING_SHARES),
)

SOURCES: dict[str, Skill] = SKILLS | FIRST_LOOKS


def shares_at(step: int, only: tuple[str, ...] = ()) -> dict[str, float]:
    """Shares in a step, by name in SOURCES; for trials, `only` keeps the named ones."""
    if only:
        return {name: SHARES.get(name, 1.0) for name in only}
    for length, shares in STAGES:
        if step < length:
            return shares
        step -= length
    return SHARES

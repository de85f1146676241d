"""How often each skill is drawn: one easy question, easy first looks, mostly seeing, then the whole diet.

A stage is chosen by the number of the step and by nothing else, so a run can be repeated.
"""

from __future__ import annotations

from models.demo_training.skills import FIRST_LOOKS, LESSONS, SKILLS, Skill

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

# The main diet: lessons carry most of it, and every evaluated kind of sample is there as well.
MAIN_SHARES: dict[str, float] = {
    "small scene": 8,
    "scene": 5,
    "places": 4,
    "small crowd": 10,
    "crowd": 10,
    "large crowd": 12,
    "size lesson": 3,
    "several": 8,
    "amounts": 3,
    "changes": 4,
    "numbered": 4,
    "last steps": 8,
    "sums": 4,
    "copies": 4,
    "errands": 2,
    "shapes": 3,
    "counts": 5,
    "positions": 2,
    "sizes": 1,
    "number": 6,
    "digits": 2,
    "lines": 8,
    "word": 12,
    "words": 4,
    "pictures": 3,
    "thinking": 1.5,
    "small clip": 6,
    "clip": 3,
    "time": 1.5,
    "motion": 0.5,
    "flashes": 2,
    "colour_order": 1.5,
    "moment": 1,
    "chat": 1.5,
    "refusal": 1,
    "arithmetic": 1,
    "repeat": 1,
    "tools": 1,
    "json": 2,
}
assert MAIN_SHARES.keys() >= SKILLS.keys()

# Small pictures teach the tower as much as large ones, for a fraction of the work; clips teach it no more.
SMALL_SHARES: dict[str, float] = {
    "small scene": 22,
    "small crowd": 10,
    "first digit": 10,
    "lines": 12,
    "number": 14,
    "word": 5,
    "small clip": 4,
    "several": 6,
    "chat": 2,
    "refusal": 1,
    "sums": 7,
    "copies": 6,
    "errands": 4,
    "json": 1,
}

# For tower and resampler alone, which only patches teach: their questions are not asked.
SEEING_SHARES: dict[str, float] = {
    "small scene": 8,
    "scene": 4,
    "small crowd": 14,
    "crowd": 9,
    "size lesson": 3,
    "number": 20,
    "word": 16,
    "lines": 18,
    "small clip": 8,
    "clip": 1,
    "time": 1.5,
}

# Finding what a question names, in text and in pictures, and saying where it was. As one lesson among forty
# it stayed a guess for a thousand steps; nearly by itself it is learnt within a hundred.
FINDING_SHARES: dict[str, float] = {
    "last steps": 40,
    "several": 22,
    "numbered": 7,
    "changes": 8,
    "amounts": 3,
    "small scene": 8,
    "places": 4,
    "small crowd": 4,
    "number": 2,
    "word": 4,
}

# (steps, shares) of the stages before the main diet.
STAGES: tuple[tuple[int, dict[str, float]], ...] = (
    (250, {"first thing": 3, "first digit": 1}),
    (240, SMALL_SHARES),
)

SOURCES: dict[str, Skill] = SKILLS | FIRST_LOOKS | LESSONS


def shares_at(step: int, only: tuple[str, ...] = (), stage: str = "") -> dict[str, float]:
    """Shares in a step, by name in SOURCES; for trials, `only` keeps the named ones.

    A run that begins with another's weights names its one stage.
    """
    if only:
        return {name: SHARES.get(name, 1.0) for name in only}
    if stage:
        return {"seeing": SEEING_SHARES, "finding": FINDING_SHARES, "main": MAIN_SHARES}[stage]
    for length, shares in STAGES:
        if step < length:
            return shares
        step -= length
    return MAIN_SHARES

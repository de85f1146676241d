"""All skills by name. A skill is a function from a random source to a sample; it keeps nothing."""

from __future__ import annotations

import random
from collections.abc import Callable

from models.demo_training.sample import Sample
from models.demo_training.skills import (
    chat,
    counting,
    first_looks,
    last_steps,
    lessons,
    pictures,
    positions,
    reading,
    shapes,
    text,
    tools,
    video,
)

Skill = Callable[[random.Random], Sample]

SKILLS: dict[str, Skill] = {
    "shapes": shapes.sample,
    "counts": counting.sample,
    "positions": positions.sample_position,
    "sizes": positions.sample_size,
    "digits": reading.sample_digits,
    "words": reading.sample_words,
    "pictures": pictures.sample,
    "motion": video.sample_motion,
    "flashes": video.sample_flashes,
    "colour_order": video.sample_colour_order,
    "moment": video.sample_moment,
    "chat": chat.sample,
    "refusal": chat.sample_refusal,
    "arithmetic": text.sample_arithmetic,
    "repeat": text.sample_repeat,
    "thinking": pictures.sample_thinking,
    "tools": tools.sample_tools,
    "json": tools.sample_json,
}

# Only for the first stages of training; their samples call themselves shapes and digits.
FIRST_LOOKS: dict[str, Skill] = {
    "first thing": first_looks.sample_thing,
    "first digit": first_looks.sample_digit,
}

# Several questions about the same pictures; also for training only.
LESSONS: dict[str, Skill] = {
    "small scene": lessons.small_scene,
    "scene": lessons.scene,
    "small crowd": lessons.small_crowd,
    "crowd": lessons.crowd,
    "large crowd": lessons.large_crowd,
    "size lesson": lessons.sizes,
    "places": lessons.places,
    "several": lessons.several,
    "changes": lessons.changes,
    "amounts": lessons.amounts,
    "numbered": lessons.numbered,
    "lines": lessons.lines,
    "number": lessons.number,
    "word": lessons.word,
    "small clip": lessons.small_clip,
    "clip": lessons.clip,
    "time": video.moment_lesson,
    "last steps": last_steps.sample,
    "sums": lessons.sums,
    "copies": lessons.copies,
    "errands": lessons.errands,
}

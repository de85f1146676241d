"""The last step of thinking alone: reasoning is given, and the answer that follows from it is learnt.

What a model wrote about its pictures was right more often than what it concluded: which of them shows a
thing, what changed, how many there were. Text costs a twentieth of pictures, so this is taught without them.
Never evaluated.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from models.demo_training.dialogue import Exercise, last_steps, pick_language
from models.demo_training.names import SHAPES, Language
from models.demo_training.sample import Sample
from models.demo_training.scene import Scene, compatible_colours, place_things, random_kinds, random_scene
from models.demo_training.skills import counting, pictures, positions, shapes, video

SIDE = (168, 168)

Draw = Callable[[random.Random, Language], Exercise | None]


def sample(rng: random.Random) -> Sample:
    """Three to six questions of all kinds, each with reasoning of its own."""
    language, wanted = pick_language(rng), rng.randint(3, 6)
    exercises: list[tuple[str, Exercise]] = []
    while len(exercises) < wanted:
        skill, draw = rng.choices(_DRAWS, _WEIGHTS)[0]
        exercise = draw(rng, language)
        if exercise is not None:
            exercises.append((skill, exercise))
    return last_steps(exercises)


def _scenes(rng: random.Random, most_things: int) -> list[Scene]:
    return [
        random_scene(rng, rng.randint(1, most_things), SIDE, may_be_large=False)
        for _ in range(rng.choices((2, 3, 4), weights=(3, 4, 3))[0])
    ]


def _which(rng: random.Random, language: Language) -> Exercise | None:
    return pictures.which_exercise(rng, _scenes(rng, 2), language)


def _what_in(rng: random.Random, language: Language) -> Exercise:
    return pictures.what_in_exercise(rng, _scenes(rng, 2), language)


def _most(rng: random.Random, language: Language) -> Exercise:
    shape, shown = pictures.amounts(rng, language)
    return pictures.most_exercise(rng, shape, shown, rng.random() < 0.6, language)


def _number(rng: random.Random, language: Language) -> Exercise:
    numbers, shown = pictures.numbered(rng, language)
    return pictures.number_exercise(rng, numbers, shown, language)


def _difference(rng: random.Random, language: Language) -> Exercise:
    return pictures.difference_exercise(rng, pictures.changed(rng), language)


def _scene(rng: random.Random) -> Scene:
    return Scene(SIDE, place_things(rng, random_kinds(rng, rng.randint(2, 4)), SIDE, (0.1, 0.2)))


def _position(rng: random.Random, language: Language) -> Exercise | None:
    return positions.position_exercise(rng, _scene(rng), language)


def _shape(rng: random.Random, language: Language) -> Exercise | None:
    """None for a description: what there is does not follow from how many there are."""
    scene = _scene(rng)
    exercise = shapes.ask(rng, scene, language)
    return exercise if exercise.chain == shapes.contents_chain(scene, language) else None


def _count(rng: random.Random, language: Language) -> Exercise | None:
    few, colours = rng.sample(list(SHAPES), 2), rng.sample(compatible_colours(rng), 2)
    kinds = [(rng.choice(few), rng.choice(colours)) for _ in range(rng.randint(1, counting.MOST_THINGS))]
    scene = Scene(SIDE, place_things(rng, kinds, SIDE))
    return counting.exercise_about(rng, scene, rng.choice(counting.WAYS), *rng.choice(kinds), language)


def _size(rng: random.Random, language: Language) -> Exercise:
    return positions.size_exercise(rng, *positions.sized_scene(rng, SIDE), language)


def _flashes(rng: random.Random, language: Language) -> Exercise:
    return video.flashes(rng, language).exercise


def _moment(rng: random.Random, language: Language) -> Exercise:
    return video.moment(rng, language).exercise


_DRAWS: list[tuple[str, Draw]] = [
    ("pictures", _which),
    ("pictures", _what_in),
    ("pictures", _most),
    ("pictures", _number),
    ("pictures", _difference),
    ("positions", _position),
    ("shapes", _shape),
    ("counts", _count),
    ("sizes", _size),
    ("flashes", _flashes),
    ("moment", _moment),
]
_WEIGHTS = (10, 2, 4, 6, 6, 5, 4, 2, 1, 1, 1)

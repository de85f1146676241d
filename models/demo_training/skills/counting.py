"""How many: all things, those of a colour, of a shape, or both; none to nine."""

from __future__ import annotations

import random
from collections.abc import Callable

from models.demo_training.checkers import is_number
from models.demo_training.dialogue import Exercise, conversation, in_language, pick_language, vary
from models.demo_training.finish import picture_size
from models.demo_training.names import COLOURS, SHAPES, Language, sentence, thing
from models.demo_training.sample import Sample, picture
from models.demo_training.scene import Scene, Thing, compatible_colours, place_things

MOST = 9
MOST_THINGS = 11  # counted ones and others together
WAYS = ("all", "shape", "colour", "both")


def sample(rng: random.Random) -> Sample:
    language = pick_language(rng)
    exercise, scene = counting_exercise(rng, language)
    return conversation(rng, "counts", language, [exercise], [picture(scene.render(rng))])


def counting_exercise(rng: random.Random, language: Language) -> tuple[Exercise, Scene]:
    """A scene built around the number to count, so that all numbers are equally frequent."""
    count = 0 if rng.random() < 0.06 else rng.randint(1, MOST)
    colours = compatible_colours(rng)
    shape, colour = rng.choice(list(SHAPES)), rng.choice(colours)
    by = rng.choice(WAYS)
    if by == "all":
        count = max(1, count)
    counted = [_counted(rng, by, shape, colour, colours) for _ in range(count)]
    others = 0 if by == "all" else rng.randint(0 if count else 1, min(4, MOST_THINGS - count))
    rest = [_other(rng, by, shape, colour, colours) for _ in range(others)]
    size = picture_size(rng, (98, 252) if count + others < 6 else (126, 252))
    scene = Scene(size, place_things(rng, counted + rest, size))
    return _exercise(rng, scene, by, shape, colour, count, language), scene


def _counted(rng: random.Random, by: str, shape: str, colour: str, colours: list[str]) -> tuple[str, str]:
    if by == "all":
        return rng.choice(list(SHAPES)), rng.choice(colours)
    return (
        shape if by in ("shape", "both") else rng.choice(list(SHAPES)),
        colour if by in ("colour", "both") else rng.choice(colours),
    )


def _other(rng: random.Random, by: str, shape: str, colour: str, colours: list[str]) -> tuple[str, str]:
    """A thing that must not be counted; for 'both' it often shares one of the two."""
    other_shape = rng.choice([s for s in SHAPES if s != shape])
    other_colour = rng.choice([c for c in colours if c != colour])
    if by == "shape":
        return other_shape, rng.choice(colours)
    if by == "colour":
        return rng.choice(list(SHAPES)), other_colour
    return rng.choice(((other_shape, colour), (shape, other_colour), (other_shape, other_colour)))


def _what(by: str, shape: str, colour: str, language: Language, count: int) -> str:
    if by == "all":
        return in_language(language, "shapes" if count != 1 else "shape", "图形")
    if by == "shape":
        return SHAPES[shape].say(language, count)
    if by == "colour":
        name = COLOURS[colour].say(language)
        return in_language(language, f"{name} {'shapes' if count != 1 else 'shape'}", f"{name}图形")
    return thing(shape, colour, language, count)


def _exercise(
    rng: random.Random, scene: Scene, by: str, shape: str, colour: str, count: int, language: Language
) -> Exercise:
    wanted_shape = shape if by in ("shape", "both") else None
    wanted_colour = colour if by in ("colour", "both") else None

    def is_counted(t: Thing) -> bool:
        return wanted_shape in (None, t.shape) and wanted_colour in (None, t.colour)

    question = vary(
        rng,
        language,
        (
            "How many {what} are there?",
            "How many {what} do you see?",
            "Count the {what}.",
            "How many {what} are in the picture?",
            "What is the number of {what}?",
        ),
        ("有几个{what}？", "图中有多少个{what}？", "数一数有几个{what}。", "{what}有多少个？"),
        what=_what(by, shape, colour, language, 2),
    )
    if rng.random() < 0.5:
        answer = sentence(str(count), language)
    else:
        what = _what(by, shape, colour, language, count)
        verb = "is" if count == 1 else "are"
        answer = in_language(language, f"There {verb} {count} {what}.", f"有{count}个{what}。")
    return Exercise(question, answer, counting_chain(scene, is_counted, language), is_number(count),
                    sought=(wanted_shape, wanted_colour))  # fmt: skip


def exercise_about(
    rng: random.Random, scene: Scene, by: str, shape: str, colour: str, language: Language
) -> Exercise | None:
    """Count in a scene that is there already; None when there are too many."""
    counted = scene.of(
        shape if by in ("shape", "both") else None, colour if by in ("colour", "both") else None
    )
    if len(counted) > MOST:
        return None
    return _exercise(rng, scene, by, shape, colour, len(counted), language)


def counting_chain(scene: Scene, is_counted: Callable[[Thing], bool], language: Language) -> str:
    """Goes through the things from left to right with the running count behind each."""
    running, steps = 0, []
    for t in scene.things:
        running += is_counted(t)
        steps.append(f"{t.say(language)} {running}")
    row = in_language(language, ", ", "，").join(steps) or in_language(language, "nothing", "没有")
    return in_language(language, f"From left to right: {row}.", f"从左到右：{row}。")

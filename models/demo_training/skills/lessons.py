"""Lessons: several questions about the same pictures, every answer taught. Never evaluated.

A picture costs as much as five questions about it, so a lesson teaches several times as much for the same
work. Questions, answers and reasoning are those of the evaluated skills, and count as theirs in the log.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from models.demo_training.checkers import contains, says_exactly
from models.demo_training.dialogue import Exercise, lesson, pick_language, vary
from models.demo_training.finish import FRAME, SEVERAL, picture_size
from models.demo_training.names import SHAPES, Language
from models.demo_training.sample import Sample, picture, taught, user
from models.demo_training.scene import Scene, compatible_colours, place_things, random_kinds, random_scene
from models.demo_training.skills import counting, pictures, positions, reading, shapes, text, tools, video
from models.demo_training.skills.signatures import TOOLS

Skilled = tuple[str, Exercise]
SMALL = (70, 168)  # nothing is fed smaller than 168 x 168
LARGE = (112, 240)
TINY = (56, 84)


def small_scene(rng: random.Random) -> Sample:
    """Few things in a small picture: early seeing, quickly computed."""
    return _scene(rng, SMALL, rng.choices((1, 2, 3), weights=(3, 3, 2))[0])


def scene(rng: random.Random) -> Sample:
    return _scene(rng, LARGE, rng.choices((1, 2, 3, 4), weights=(2, 3, 3, 2))[0])


def _scene(rng: random.Random, sides: tuple[int, int], count: int) -> Sample:
    """What things there are, their colours and shapes, places and order."""
    language = pick_language(rng)
    size = picture_size(rng, sides, may_be_large=False)
    shown = Scene(size, place_things(rng, random_kinds(rng, count), size))
    makes: list[tuple[str, Callable[[], Exercise | None]]] = [
        ("shapes", lambda: shapes.describe(rng, shown, language)),
        ("shapes", lambda: shapes.ask(rng, shown, language)),
        ("positions", lambda: positions.position_exercise(rng, shown, language)),
        ("json", lambda: tools.scene_exercise(rng, shown, language)),
        ("counts", lambda: _count(rng, shown, language)),
    ]
    exercises = _different(rng, makes, (4, 5, 5, 1, 2), rng.randint(4, 8))
    return lesson(rng, language, exercises, [picture(shown.render(rng))])


def small_crowd(rng: random.Random) -> Sample:
    return _crowd(rng, (84, 168), rng.randint(1, 6))


def crowd(rng: random.Random) -> Sample:
    return _crowd(rng, (112, 240), rng.randint(2, counting.MOST_THINGS))


def large_crowd(rng: random.Random) -> Sample:
    """Nearly all of one kind, so that answers of six to nine are as common as the skill asks for them."""
    return _crowd(rng, (112, 240), rng.randint(6, counting.MOST_THINGS), most=rng.choice((0.7, 0.85, 1.0)))


def _crowd(rng: random.Random, sides: tuple[int, int], count: int, most: float = 0.0) -> Sample:
    """Things of few kinds, the first kind with a chance of `most`, counted in several ways."""
    language = pick_language(rng)
    colours = rng.sample(compatible_colours(rng), 3)
    few = rng.sample(list(SHAPES), rng.randint(1, 3))
    kinds = [
        (few[0], colours[0])
        if rng.random() < most
        else (rng.choice(few), rng.choice(colours[: rng.randint(1, 3)]))
        for _ in range(count)
    ]
    size = picture_size(rng, sides, may_be_large=False)
    shown = Scene(size, place_things(rng, kinds, size))
    makes = [("counts", lambda: _count(rng, shown, language))]
    exercises = _different(rng, makes, (1,), rng.randint(4, 9))
    return lesson(rng, language, exercises, [picture(shown.render(rng))])


def _count(rng: random.Random, shown: Scene, language: Language) -> Exercise | None:
    """By what is there, now and then by what is not; never more than the skill counts to."""
    if not shown.things or rng.random() < 0.08:
        kind = rng.choice(random_kinds(rng, 4))
    else:
        thing = rng.choice(shown.things)
        kind = thing.shape, thing.colour
    return counting.exercise_about(rng, shown, rng.choice(counting.WAYS), *kind, language)


def sizes(rng: random.Random) -> Sample:
    language = pick_language(rng)
    shown, by_size = positions.sized_scene(rng, picture_size(rng, (84, 200), may_be_large=False))
    makes = [
        ("sizes", lambda: positions.size_exercise(rng, shown, by_size, language)),
        ("positions", lambda: positions.position_exercise(rng, shown, language)),
    ]
    return lesson(rng, language, _different(rng, makes, (3, 1), 6), [picture(shown.render(rng))])


def places(rng: random.Random) -> Sample:
    """Where the things of a small picture are, in every way that is asked."""
    language = pick_language(rng)
    size = picture_size(rng, (84, 168), may_be_large=False)
    kinds = random_kinds(rng, rng.choices((1, 2, 3, 4), weights=(1, 3, 3, 1))[0])
    shown = Scene(size, place_things(rng, kinds, size, (0.1, 0.22)))
    makes: list[tuple[str, Callable[[], Exercise | None]]] = [
        ("positions", lambda: positions.position_exercise(rng, shown, language)),
        ("shapes", lambda: shapes.describe(rng, shown, language)),
    ]
    exercises = _different(rng, makes, (8, 1), rng.randint(5, 8))
    return lesson(rng, language, exercises, [picture(shown.render(rng))])


def several(rng: random.Random) -> Sample:
    """Two to four small pictures: what one shows, and which one shows something."""
    language = pick_language(rng)
    count = rng.choices((2, 3, 4), weights=(4, 4, 2))[0]
    scenes = [
        random_scene(rng, rng.choices((1, 2), weights=(3, 1))[0], SEVERAL, may_be_large=False)
        for _ in range(count)
    ]
    makes = [
        ("pictures", lambda: pictures.what_in_exercise(rng, scenes, language)),
        ("pictures", lambda: pictures.which_exercise(rng, scenes, language)),
    ]
    exercises = _different(rng, makes, (2, 3), rng.randint(5, 8))
    return lesson(rng, language, exercises, [picture(s.render(rng)) for s in scenes])


def amounts(rng: random.Random) -> Sample:
    """Equal things in several pictures, counted and compared."""
    language = pick_language(rng)
    shape, shown = pictures.amounts(rng, language)
    words = [s.words for s in shown]
    makes = [
        ("pictures", lambda: pictures.most_exercise(rng, shape, shown, rng.random() < 0.6, language)),
        ("pictures", lambda: _described(rng, words, language)),
    ]
    exercises = _different(rng, makes, (1, 1), rng.randint(4, 6))
    return lesson(rng, language, exercises, [picture(s.image) for s in shown])


def changes(rng: random.Random) -> Sample:
    """What differs between two pictures, and what each of them shows."""
    language = pick_language(rng)
    change = pictures.changed(rng)
    scenes = [change.before, change.after]
    makes = [
        ("pictures", lambda: pictures.difference_exercise(rng, change, language)),
        ("pictures", lambda: pictures.what_in_exercise(rng, scenes, language)),
    ]
    exercises = _different(rng, makes, (2, 1), rng.randint(4, 6))
    return lesson(rng, language, exercises, [picture(s.render(rng)) for s in scenes])


def numbered(rng: random.Random) -> Sample:
    """A number in each of several pictures, read and found."""
    language = pick_language(rng)
    numbers, shown = pictures.numbered(rng, language)
    words = [s.words for s in shown]
    makes = [
        ("pictures", lambda: pictures.number_exercise(rng, numbers, shown, language)),
        ("pictures", lambda: _described(rng, words, language)),
    ]
    exercises = _different(rng, makes, (1, 1), rng.randint(2, 4))
    return lesson(rng, language, exercises, [picture(s.image) for s in shown])


def _described(rng: random.Random, words: list[str], language: Language) -> Exercise:
    number = rng.randrange(len(words))
    return pictures.described(rng, number, words, contains(words[number]), language)


def lines(rng: random.Random) -> Sample:
    """Several numbers and words below each other: many letters to learn from one picture."""
    language = pick_language(rng)
    numbers = rng.choice((1.0, 0.5, 0.0))
    written = [
        reading.random_number(rng) if rng.random() < numbers else reading.random_word(rng)
        for _ in range(rng.randint(2, 5))
    ]
    question = vary(
        rng, language, ("Read all lines.", "Read everything line by line."), ("逐行读出。", "读出所有的行。")
    )
    answer = "\n".join(written)
    shown = picture(reading.lines_picture(rng, written, rng.randint(84, 140)))
    skill = "digits" if numbers == 1.0 else "words"
    return Sample(skill, [user(shown, question)], answer, says_exactly(answer), spelled=answer)


def number(rng: random.Random) -> Sample:
    """One number asked for in several ways, most often with and without spelling it first."""
    written, language = reading.random_number(rng), pick_language(rng)
    exercises = [("digits", reading.number_exercise(rng, written, language)) for _ in range(3)]
    return lesson(rng, language, exercises, [picture(reading.text_picture(rng, written))])


def word(rng: random.Random) -> Sample:
    written, language = reading.random_word(rng), pick_language(rng)
    exercises = [("words", reading.word_exercise(rng, written, language)) for _ in range(3)]
    return lesson(rng, language, exercises, [picture(reading.text_picture(rng, written))])


def small_clip(rng: random.Random) -> Sample:
    """Whole clips for the price of a picture."""
    return video.clip_lesson(rng, TINY)


def clip(rng: random.Random) -> Sample:
    return video.clip_lesson(rng, FRAME)


def sums(rng: random.Random) -> Sample:
    """Some calculations in a row."""
    language = pick_language(rng)
    exercises = [("arithmetic", text.arithmetic_exercise(rng, language)) for _ in range(rng.randint(2, 5))]
    return lesson(rng, language, exercises)


def copies(rng: random.Random) -> Sample:
    language = pick_language(rng)
    exercises = [("repeat", text.repeat_exercise(rng, language)) for _ in range(rng.randint(2, 5))]
    return lesson(rng, language, exercises)


def errands(rng: random.Random) -> Sample:
    """Wishes that need a tool, each with its call, its result and the answer in words."""
    language = pick_language(rng)
    offered = rng.sample(TOOLS, rng.choices((1, 2, 3), weights=(3, 4, 3))[0])
    messages = []
    for last in [False] * rng.randint(1, 3) + [True]:
        wish, call = tools.wish_and_call(rng, offered, language, rng.random() < 0.12)
        messages.append(user(wish))
        if last:
            break
        messages.append(taught(call))
        if rng.random() < 0.6:
            value, answer = tools.result_and_answer(rng, language)
            messages.append({"role": "tool", "content": json.dumps({"result": value}, ensure_ascii=False)})
            messages.append(taught(answer))
    return Sample("tools", messages, call.answer, lambda said: said == call.answer, call.reasoning,
                  [t.definition for t in offered])  # fmt: skip


def _different(
    rng: random.Random,
    makes: list[tuple[str, Callable[[], Exercise | None]]],
    weights: tuple[int, ...],
    count: int,
) -> list[Skilled]:
    """Up to `count` exercises with different questions; at least one."""
    found: dict[str, Skilled] = {}
    tries = 0
    while not found or (len(found) < count and tries < 4 * count):
        tries += 1
        skill, make = rng.choices(makes, weights)[0]
        exercise = make()
        if exercise is not None:
            found.setdefault(exercise.question, (skill, exercise))
    return list(found.values())

"""Two to four pictures: which one shows something, what one of them shows, what differs between two."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from PIL import Image

from models.demo_training.checkers import is_number, names_in_order
from models.demo_training.dialogue import Exercise, conversation, in_language, pick_language, vary
from models.demo_training.finish import SEVERAL, picture_size
from models.demo_training.names import COLOURS, SHAPES, Language, a_thing, sentence, thing
from models.demo_training.sample import Checker, Sample, picture
from models.demo_training.scene import (
    Scene,
    Thing,
    compatible_colours,
    place_things,
    random_kinds,
    random_scene,
)
from models.demo_training.skills.reading import random_number, text_picture
from models.demo_training.skills.shapes import names_things

NUMBER_SIDES = (84, 140)


@dataclass(frozen=True)
class Shown:
    """One of the pictures: what it shows in words, and how many things if that is asked."""

    image: Image.Image
    words: str
    count: int = 0


def sample(rng: random.Random) -> Sample:
    language = pick_language(rng)
    make = rng.choices((_which, _most, _number, _what_in, _difference), weights=(4, 2, 2, 2, 2))[0]
    exercise, images = make(rng, language)
    return conversation(rng, "pictures", language, [exercise], [picture(image) for image in images])


def sample_thinking(rng: random.Random) -> Sample:
    """The same kinds of question, always with the chain written out."""
    language = pick_language(rng)
    make = rng.choices((_which, _most, _number, _difference), weights=(3, 4, 1, 2))[0]
    exercise, images = make(rng, language)
    return conversation(rng, "thinking", language, [exercise], [picture(i) for i in images], thinks=True)


def _how_many(rng: random.Random) -> int:
    return rng.choices((2, 3, 4), weights=(4, 4, 2))[0]


def _chain(shown: list[str], language: Language) -> str:
    """shown: what each picture shows, in words"""
    lines = [
        in_language(language, f"Picture {i} has {words}.", f"图片{i}有{words}。")
        for i, words in enumerate(shown, 1)
    ]
    return in_language(language, " ", "").join(lines)


def _picture_answer(number: int, language: Language) -> str:
    return in_language(language, f"Picture {number}.", f"图片{number}。")


def _small_scene(rng: random.Random, count: int) -> Scene:
    return random_scene(rng, count, SEVERAL, may_be_large=False)


def _which(rng: random.Random, language: Language) -> tuple[Exercise, list[Image.Image]]:
    """One picture has the thing, the others do not."""
    scenes = [_small_scene(rng, rng.choices((1, 2), weights=(3, 1))[0]) for _ in range(_how_many(rng))]
    number = rng.randrange(len(scenes))
    wanted = rng.choice(scenes[number].things)
    for i in range(len(scenes)):
        while i != number and scenes[i].of(wanted.shape, wanted.colour):
            scenes[i] = _small_scene(rng, 1)
    exercise = _asked_which(rng, scenes, number, wanted, language)
    return exercise, [s.render(rng) for s in scenes]


def which_exercise(rng: random.Random, scenes: list[Scene], language: Language) -> Exercise | None:
    """About pictures that are there already; None when no thing is in one of them only."""
    kinds = [(number, t) for number, s in enumerate(scenes) for t in s.things]
    single = [(n, t) for n, t in kinds if sum(bool(s.of(t.shape, t.colour)) for s in scenes) == 1]
    if not single:
        return None
    number, wanted = rng.choice(single)
    return _asked_which(rng, scenes, number, wanted, language)


def _asked_which(
    rng: random.Random, scenes: list[Scene], number: int, wanted: Thing, language: Language
) -> Exercise:
    question = vary(
        rng,
        language,
        ("Which picture shows {what}?", "Which picture has {what}?", "In which picture is {what}?"),
        ("哪张图片有{what}？", "哪一张图里有{what}？"),
        what=a_thing(wanted.shape, wanted.colour, language),
    )
    chain = _chain([s.describe(language) for s in scenes], language)
    return Exercise(
        question,
        _picture_answer(number + 1, language),
        chain,
        is_number(number + 1),
        sought=(wanted.shape, wanted.colour),
    )


def _most(rng: random.Random, language: Language) -> tuple[Exercise, list[Image.Image]]:
    shape, shown = amounts(rng, language)
    return most_exercise(rng, shape, shown, rng.random() < 0.6, language), [s.image for s in shown]


def amounts(rng: random.Random, language: Language) -> tuple[str, list[Shown]]:
    """Equal things in every picture, in different numbers; with their shape."""
    shape, colour = rng.choice(list(SHAPES)), rng.choice(compatible_colours(rng))
    shown = []
    for count in rng.sample(range(1, 7), _how_many(rng)):
        size = picture_size(rng, SEVERAL if count < 4 else (98, SEVERAL[1]), may_be_large=False)
        scene = Scene(size, place_things(rng, [(shape, colour)] * count, size))
        joint = in_language(language, f"{count} ", f"{count}个")
        shown.append(Shown(scene.render(rng), joint + thing(shape, colour, language, count), count))
    return shape, shown


def most_exercise(
    rng: random.Random, shape: str, shown: list[Shown], most: bool, language: Language
) -> Exercise:
    counts = [s.count for s in shown]
    number = counts.index(max(counts) if most else min(counts)) + 1
    question = vary(
        rng,
        language,
        ("Which picture has the {which} {what}?", "Which picture shows the {which} {what}?"),
        ("哪张图片的{what}{which}？", "哪一张图里{what}{which}？"),
        which=in_language(language, "most" if most else "fewest", "最多" if most else "最少"),
        what=SHAPES[shape].say(language, 2),
    )
    return Exercise(
        question,
        _picture_answer(number, language),
        _chain([s.words for s in shown], language),
        is_number(number),
    )


def _number(rng: random.Random, language: Language) -> tuple[Exercise, list[Image.Image]]:
    numbers, shown = numbered(rng, language)
    return number_exercise(rng, numbers, shown, language), [s.image for s in shown]


def numbered(rng: random.Random, language: Language) -> tuple[list[str], list[Shown]]:
    """A different number in every picture."""
    numbers: list[str] = []
    while len(numbers) < 2 or (len(numbers) < 4 and rng.random() < 0.4):
        candidate = random_number(rng, 3)
        if candidate not in numbers:
            numbers.append(candidate)
    images = [text_picture(rng, n, NUMBER_SIDES, with_shape=0.0) for n in numbers]
    words = [in_language(language, f"the number {n}", f"数字{n}") for n in numbers]
    return numbers, [Shown(image, said) for image, said in zip(images, words, strict=True)]


def number_exercise(
    rng: random.Random, numbers: list[str], shown: list[Shown], language: Language
) -> Exercise:
    number = rng.randrange(len(numbers))
    question = vary(
        rng,
        language,
        ("Which picture shows the number {n}?", "In which picture is the number {n}?"),
        ("哪张图片写着{n}？", "数字{n}在哪张图片里？"),
        n=numbers[number],
    )
    return Exercise(
        question,
        _picture_answer(number + 1, language),
        _chain([s.words for s in shown], language),
        is_number(number + 1),
        sought=(numbers[number][0], None),
    )


def _what_in(rng: random.Random, language: Language) -> tuple[Exercise, list[Image.Image]]:
    scenes = [_small_scene(rng, rng.choices((1, 2), weights=(3, 1))[0]) for _ in range(_how_many(rng))]
    return what_in_exercise(rng, scenes, language), [s.render(rng) for s in scenes]


def what_in_exercise(rng: random.Random, scenes: list[Scene], language: Language) -> Exercise:
    number = rng.randrange(len(scenes))
    words = [s.describe(language) for s in scenes]
    return described(rng, number, words, names_things(scenes[number].things), language)


def described(
    rng: random.Random, number: int, words: list[str], checker: Checker, language: Language
) -> Exercise:
    """words: what each picture shows; `number` counts from 0."""
    question = vary(
        rng,
        language,
        ("What is in picture {n}?", "What does picture {n} show?", "Describe picture {n}."),
        ("图片{n}里有什么？", "描述图片{n}。"),
        n=number + 1,
    )
    return Exercise(question, sentence(words[number], language), _chain(words, language), checker)


@dataclass(frozen=True)
class Change:
    """Two pictures of the same things, but one changed its colour or its shape."""

    before: Scene
    after: Scene
    old: Thing
    new: Thing


def _difference(rng: random.Random, language: Language) -> tuple[Exercise, list[Image.Image]]:
    change = changed(rng)
    exercise = difference_exercise(rng, change, language)
    return exercise, [change.before.render(rng), change.after.render(rng)]


def changed(rng: random.Random) -> Change:
    colours = compatible_colours(rng)
    size = picture_size(rng, SEVERAL, may_be_large=False)
    first = Scene(size, place_things(rng, random_kinds(rng, rng.randint(1, 3), colours=colours), size))
    index = rng.randrange(len(first.things))
    old = first.things[index]
    if rng.random() < 0.5:
        new = replace(old, colour=rng.choice([c for c in colours if c != old.colour]))
    else:
        new = replace(old, shape=rng.choice([s for s in SHAPES if s != old.shape]))
    things = list(first.things)
    things[index] = new
    return Change(first, Scene(size, tuple(things)), old, new)


def difference_exercise(rng: random.Random, change: Change, language: Language) -> Exercise:
    old, new = change.old, change.new
    question = vary(
        rng,
        language,
        (
            "What is different?",
            "What differs between the two pictures?",
            "What changed from picture 1 to picture 2?",
        ),
        ("有什么不同？", "两张图片有什么区别？", "从图片1到图片2有什么变化？"),
    )
    answer = in_language(
        language,
        f"The {old.say('en')} became {new.a('en')}.",
        f"{old.say('zh')}变成了{new.say('zh')}。",
    )
    checker = names_in_order([old.colour, old.shape, new.colour, new.shape], {**COLOURS, **SHAPES})
    words = [change.before.describe(language), change.after.describe(language)]
    return Exercise(question, answer, _chain(words, language), checker)

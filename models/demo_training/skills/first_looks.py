"""Easy samples for the very start of training: one large thing or digit, the plainest questions, no thinking.

A model that starts on many kinds of question first learns to answer blindly. With little but a colour and a
shape to tell it finds the picture soon, and goes on looking when more questions come. Never evaluated.
"""

from __future__ import annotations

import random

from models.demo_training.checkers import is_number, names_only
from models.demo_training.dialogue import Exercise, conversation, in_language, lesson, pick_language
from models.demo_training.finish import picture_size
from models.demo_training.names import COLOURS, SHAPES, Language, sentence
from models.demo_training.sample import Sample, picture
from models.demo_training.scene import Scene, Thing, place_things, random_kinds
from models.demo_training.skills.reading import text_picture
from models.demo_training.skills.shapes import names_things

SIDES = (70, 112)


def sample_thing(rng: random.Random) -> Sample:
    """The colour, the shape and both of a single thing that fills much of a small picture."""
    language, scene = pick_language(rng), _one_large_thing(rng)
    makes = [_colour, _shape, _whole]
    rng.shuffle(makes)
    exercises = [("shapes", make(scene.things[0], language)) for make in makes]
    return lesson(rng, language, exercises, [picture(scene.render(rng))])


def _one_large_thing(rng: random.Random) -> Scene:
    size = picture_size(rng, SIDES, max_aspect=1.3, may_be_large=False)
    return Scene(size, place_things(rng, random_kinds(rng, 1), size, (0.28, 0.42)))


def _colour(thing: Thing, language: Language) -> Exercise:
    question = in_language(language, "What colour is it?", "它是什么颜色？")
    answer = sentence(COLOURS[thing.colour].say(language), language)
    return Exercise(question, answer, "", names_only([thing.colour], COLOURS))


def _shape(thing: Thing, language: Language) -> Exercise:
    question = in_language(language, "What shape is this?", "这是什么形状？")
    name = SHAPES[thing.shape].say(language)
    answer = sentence(in_language(language, f"a {name}", name), language)
    return Exercise(question, answer, "", names_only([thing.shape], SHAPES))


def _whole(thing: Thing, language: Language) -> Exercise:
    question = in_language(language, "What is in the picture?", "图片里有什么？")
    return Exercise(question, sentence(thing.a(language), language), "", names_things([thing]))


def sample_digit(rng: random.Random) -> Sample:
    """One or two digits."""
    language = pick_language(rng)
    number = str(rng.randint(0, 9) if rng.random() < 0.5 else rng.randint(10, 99))
    question = in_language(language, "What number is in the picture?", "图中的数字是多少？")
    exercise = Exercise(question, number, "", is_number(float(number)))
    shown = picture(text_picture(rng, number, SIDES, with_shape=0.0))
    return conversation(rng, "digits", language, [exercise], [shown], thinks=False)

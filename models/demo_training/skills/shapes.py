"""Shapes and colours in one picture: name them, find one by the other, describe the whole."""

from __future__ import annotations

import random

from models.demo_training.checkers import contains, is_yes, mentions, names_only
from models.demo_training.dialogue import Exercise, conversation, in_language, pick_language, vary
from models.demo_training.names import COLOURS, SHAPES, Language, a_thing, sentence
from models.demo_training.sample import Checker, Sample, picture
from models.demo_training.scene import Scene, Thing, random_kinds, random_scene

EMPTY_SHARE = 0.03
ASK_WHAT = (
    (
        "What is in the picture?",
        "Describe the picture.",
        "What do you see?",
        "Describe this image.",
        "What's in this image?",
        "Tell me what the picture shows.",
        "What does this picture show?",
    ),
    ("图片里有什么？", "描述这张图片。", "你看到了什么？", "这张图里有什么？", "请描述一下这张图。"),
)


def sample(rng: random.Random) -> Sample:
    """One to four things; up to two questions about them."""
    language = pick_language(rng)
    if rng.random() < EMPTY_SHARE:
        scene = random_scene(rng, 0)
        return conversation(rng, "shapes", language, [_nothing(rng, language)], [picture(scene.render(rng))])
    scene = random_scene(rng, rng.choices((1, 2, 3, 4), weights=(4, 3, 2, 1))[0])
    exercises = [ask(rng, scene, language) for _ in range(1 if rng.random() < 0.85 else 2)]
    return conversation(rng, "shapes", language, exercises, [picture(scene.render(rng))])


def ask(rng: random.Random, scene: Scene, language: Language) -> Exercise:
    if len(scene.things) == 1:
        asks = (describe, _shape_of_single, _colour_of_single, _is_there)
        return rng.choices(asks, weights=(4, 3, 3, 2))[0](rng, scene, language)
    one_of_shape = [t for t in scene.things if len(scene.of(shape=t.shape)) == 1]
    one_of_colour = [t for t in scene.things if len(scene.of(colour=t.colour)) == 1]
    weights = (1, 1, 2 if one_of_shape else 0, 2 if one_of_colour else 0)
    kind = rng.choices(("describe", "is_there", "colour", "shape"), weights)[0]
    if kind == "colour":
        return _colour_of(rng, scene, rng.choice(one_of_shape), language)
    if kind == "shape":
        return _shape_of(rng, scene, rng.choice(one_of_colour), language)
    return _is_there(rng, scene, language) if kind == "is_there" else describe(rng, scene, language)


def contents_chain(scene: Scene, language: Language) -> str:
    what = scene.describe(language)
    return in_language(language, f"The picture shows {what}.", f"图片中有{what}。")


def names_things(things: list[Thing] | tuple[Thing, ...]) -> Checker:
    """Names these colours and shapes and no others, each colour right before its shape."""
    wanted = sorted({(t.colour, t.shape) for t in things})

    def check(answer: str) -> bool:
        named = mentions(answer, {**COLOURS, **SHAPES})
        if len(named) % 2:
            return False
        pairs = list(zip(named[::2], named[1::2], strict=True))
        return sorted(set(pairs)) == wanted and len(pairs) == len(wanted)

    return check


def describe(rng: random.Random, scene: Scene, language: Language) -> Exercise:
    question = vary(rng, language, *ASK_WHAT)
    answer = sentence(scene.describe(language), language)
    count = len(scene.things)
    chain = in_language(
        language, f"I see {count} {'thing' if count == 1 else 'things'}.", f"我看到{count}个图形。"
    )
    return Exercise(question, answer, chain, names_things(scene.things))


def _nothing(rng: random.Random, language: Language) -> Exercise:
    """An empty picture; what the model says when there is nothing that it knows."""
    answer = in_language(language, "I see nothing that I know.", "我没有看到认识的东西。")
    chain = in_language(language, "The picture is empty.", "图片是空的。")
    return Exercise(
        vary(rng, language, *ASK_WHAT), answer, chain, contains("nothing that I know", "没有看到认识的")
    )


def _shape_of_single(rng: random.Random, scene: Scene, language: Language) -> Exercise:
    thing = scene.things[0]
    question = vary(
        rng,
        language,
        (
            "What shape is this?",
            "Which shape is in the picture?",
            "What shape do you see?",
            "Name the shape.",
        ),
        ("这是什么形状？", "图中是什么形状？", "你看到什么形状？"),
    )
    answer = in_language(language, f"A {SHAPES[thing.shape].en}.", f"{SHAPES[thing.shape].zh}。")
    return Exercise(question, answer, contents_chain(scene, language), names_only([thing.shape], SHAPES))


def _colour_of_single(rng: random.Random, scene: Scene, language: Language) -> Exercise:
    thing = scene.things[0]
    question = vary(
        rng,
        language,
        (
            "What colour is it?",
            "What color is this?",
            "What colour is the {shape}?",
            "Which color is the {shape}?",
        ),
        ("它是什么颜色？", "这是什么颜色的？", "{shape}是什么颜色？"),
        shape=SHAPES[thing.shape].say(language),
    )
    return _colour_exercise(question, thing, scene, language)


def _colour_exercise(question: str, thing: Thing, scene: Scene, language: Language) -> Exercise:
    answer = sentence(COLOURS[thing.colour].say(language), language)
    checker = names_only([thing.colour], COLOURS)
    return Exercise(question, answer, contents_chain(scene, language), checker, sought=(thing.shape, None))


def _colour_of(rng: random.Random, scene: Scene, thing: Thing, language: Language) -> Exercise:
    question = vary(
        rng,
        language,
        ("What colour is the {shape}?", "What color is the {shape}?", "Which colour does the {shape} have?"),
        ("{shape}是什么颜色？", "图中的{shape}是什么颜色的？"),
        shape=SHAPES[thing.shape].say(language),
    )
    return _colour_exercise(question, thing, scene, language)


def _shape_of(rng: random.Random, scene: Scene, thing: Thing, language: Language) -> Exercise:
    question = vary(
        rng,
        language,
        ("Which shape is {colour}?", "What shape is the {colour} one?", "What is {colour}?"),
        ("哪个形状是{colour}的？", "{colour}的是什么形状？"),
        colour=COLOURS[thing.colour].say(language),
    )
    answer = in_language(language, f"The {SHAPES[thing.shape].en}.", f"{SHAPES[thing.shape].zh}。")
    checker = names_only([thing.shape], SHAPES)
    return Exercise(question, answer, contents_chain(scene, language), checker, sought=(None, thing.colour))


def _is_there(rng: random.Random, scene: Scene, language: Language) -> Exercise:
    """Yes and no alike; a 'no' asks for a thing that shares a colour or a shape with one that is there."""
    there = {(t.shape, t.colour) for t in scene.things}
    yes = rng.random() < 0.5
    near = [(t.shape, c) for t in scene.things for c in COLOURS]
    near += [(s, t.colour) for t in scene.things for s in SHAPES]
    candidates = sorted(there) if yes else [k for k in near + random_kinds(rng, 8) if k not in there]
    shape, colour = rng.choice(candidates)
    question = vary(
        rng,
        language,
        (
            "Is there {what}?",
            "Is there {what} in the picture?",
            "Do you see {what}?",
            "Does the picture show {what}?",
        ),
        ("图中有{what}吗？", "有没有{what}？", "这张图里有{what}吗？"),
        what=a_thing(shape, colour, language),
    )
    answer = in_language(language, "Yes.", "有。") if yes else in_language(language, "No.", "没有。")
    return Exercise(question, answer, contents_chain(scene, language), is_yes(yes), sought=(shape, colour))

"""Where things are: places in the picture, neighbours, first from left or top; and how large they are."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

from models.demo_training.checkers import is_yes, names_only
from models.demo_training.dialogue import Exercise, conversation, in_language, pick_language, vary
from models.demo_training.finish import picture_size
from models.demo_training.names import PLACES, Language, sentence
from models.demo_training.sample import Sample, picture
from models.demo_training.scene import Scene, Thing, place_things, random_kinds
from models.demo_training.skills.shapes import names_things

CLEAR_OF_BORDER = 0.045  # a place is asked for only when its cell's border is this far away
CLEAR_OF_OTHER = 0.08  # and an order only when the coordinates differ by this much
SIZE_RATIO = 1.35  # and a size only when the radii differ by this factor


def sample_position(rng: random.Random) -> Sample:
    """Keep drawing until the scene allows an unambiguous question; one in two or three does."""
    language = pick_language(rng)
    while True:
        count = rng.choices((1, 2, 3, 4), weights=(2, 3, 3, 1))[0]
        size = picture_size(rng)
        scene = Scene(size, place_things(rng, random_kinds(rng, count), size, (0.1, 0.2)))
        exercise = position_exercise(rng, scene, language)
        if exercise is not None:
            return conversation(rng, "positions", language, [exercise], [picture(scene.render(rng))])


def position_exercise(rng: random.Random, scene: Scene, language: Language) -> Exercise | None:
    asks: list[Callable[[random.Random, Scene, Language], Exercise | None]] = [_place]
    if len(scene.things) > 1:
        asks += [_relation, _extreme, _extreme]
    return rng.choice(asks)(rng, scene, language)


def _is_clear(thing: Thing) -> bool:
    return all(abs(v - border) > CLEAR_OF_BORDER for v in (thing.x, thing.y) for border in (1 / 3, 2 / 3))


def _order_chain(scene: Scene, is_across: bool, language: Language) -> str:
    """All things in the order that the question is about."""
    ordered = sorted(scene.things, key=lambda t: t.x if is_across else t.y)
    names = in_language(language, ", ", "、").join(t.say(language) for t in ordered)
    if is_across:
        return in_language(language, f"From left to right: {names}.", f"从左到右：{names}。")
    return in_language(language, f"From top to bottom: {names}.", f"从上到下：{names}。")


def _place(rng: random.Random, scene: Scene, language: Language) -> Exercise | None:
    thing = rng.choice(scene.things)
    if not _is_clear(thing):
        return None
    question = vary(
        rng,
        language,
        (
            "Where is the {what}?",
            "Where in the picture is the {what}?",
            "In which part of the picture is the {what}?",
        ),
        ("{what}在哪里？", "{what}在图片的什么位置？"),
        what=thing.say(language),
    )
    where = thing.where(language)
    answer = sentence(in_language(language, f"at the {where}", f"在{where}"), language)
    chain = sentence(
        in_language(language, f"The {thing.say(language)} is at {where}", f"{thing.say(language)}在{where}"),
        language,
    )
    checker = names_only([thing.place], PLACES)
    return Exercise(question, answer, chain, checker, sought=(thing.shape, thing.colour))


def _relation(rng: random.Random, scene: Scene, language: Language) -> Exercise | None:
    first, second = rng.sample(scene.things, 2)
    side = rng.choice(("left", "right", "above", "below"))
    gap = {
        "left": second.x - first.x,
        "right": first.x - second.x,
        "above": second.y - first.y,
        "below": first.y - second.y,
    }[side]
    if abs(gap) < CLEAR_OF_OTHER:
        return None
    phrase = {
        "left": ("to the left of", "左边"),
        "right": ("to the right of", "右边"),
        "above": ("above", "上面"),
        "below": ("below", "下面"),
    }[side][language == "zh"]
    question = in_language(
        language,
        f"Is the {first.say('en')} {phrase} the {second.say('en')}?",
        f"{first.say('zh')}在{second.say('zh')}的{phrase}吗？",
    )
    yes = gap > 0
    answer = in_language(language, "Yes." if yes else "No.", "是的。" if yes else "不是。")
    chain = _order_chain(scene, side in ("left", "right"), language)
    return Exercise(question, answer, chain, is_yes(yes))


def _extreme(rng: random.Random, scene: Scene, language: Language) -> Exercise | None:
    en, zh, key = rng.choice(
        (
            ("leftmost", "最左边", lambda t: t.x),
            ("rightmost", "最右边", lambda t: -t.x),
            ("topmost", "最上面", lambda t: t.y),
            ("lowest", "最下面", lambda t: -t.y),
        )
    )
    winner, second = sorted(scene.things, key=key)[:2]
    if key(second) - key(winner) < CLEAR_OF_OTHER:
        return None
    question = vary(
        rng,
        language,
        ("Which shape is {where}?", "What is the {where} shape?", "Name the {where} shape and its colour."),
        ("{where}的是什么？", "{where}是什么图形？"),
        where=in_language(language, en, zh),
    )
    answer = sentence(in_language(language, f"the {winner.say('en')}", winner.say("zh")), language)
    chain = _order_chain(scene, en in ("leftmost", "rightmost"), language)
    return Exercise(question, answer, chain, names_things([winner]))


def sample_size(rng: random.Random) -> Sample:
    """Two to four things of clearly different sizes."""
    language = pick_language(rng)
    scene, by_size = sized_scene(rng, picture_size(rng))
    exercise = size_exercise(rng, scene, by_size, language)
    return conversation(rng, "sizes", language, [exercise], [picture(scene.render(rng))])


def sized_scene(rng: random.Random, size: tuple[int, int]) -> tuple[Scene, list[Thing]]:
    """Also its things from small to large."""
    kinds = random_kinds(rng, rng.choices((2, 3, 4), weights=(4, 3, 1))[0])
    while True:
        things = place_things(rng, kinds, size, (0.08, 0.30))
        by_size = sorted(things, key=lambda t: t.radius)
        if all(b.radius / a.radius >= SIZE_RATIO for a, b in pairwise(by_size)):
            return Scene(size, things), by_size
        kinds = kinds[: max(2, len(kinds) - (rng.random() < 0.1))]  # four sizes do not fit every picture


def size_exercise(rng: random.Random, scene: Scene, by_size: list[Thing], language: Language) -> Exercise:
    largest = rng.random() < 0.5
    if rng.random() < 0.5:
        first, second = rng.sample(by_size, 2)
        en, zh = ("larger", "大") if largest else ("smaller", "小")
        winner = max((first, second), key=lambda t: t.radius if largest else -t.radius)
        question = in_language(
            language,
            f"Which is {en}, the {first.say('en')} or the {second.say('en')}?",
            f"{first.say('zh')}和{second.say('zh')}哪个更{zh}？",
        )
    else:
        winner = by_size[-1] if largest else by_size[0]
        question = vary(
            rng,
            language,
            (
                "Which shape is the {which}?",
                "What is the {which} shape?",
                "Name the {which} shape and its colour.",
            ),
            ("{which}的图形是什么？", "哪个图形{which}？"),
            which=in_language(language, "largest" if largest else "smallest", "最大" if largest else "最小"),
        )
    order = [t.say(language) for t in by_size]
    chain = in_language(
        language,
        f"From small to large: {', '.join(order)}.",
        f"从小到大：{'、'.join(order)}。",
    )
    answer = sentence(in_language(language, f"the {winner.say('en')}", winner.say("zh")), language)
    return Exercise(question, answer, chain, names_things([winner]))

"""Tool calls in the model's own format, tool results put into words, and JSON on request.

One to three signatures stand in the prompt; the right one must be found and its arguments copied from the
question.
"""

from __future__ import annotations

import json
import random
from typing import Any

from models.demo_training.checkers import calls_tools, contains, is_json
from models.demo_training.dialogue import (
    THINKING_SHARE,
    Exercise,
    conversation,
    in_language,
    pick_language,
    vary,
)
from models.demo_training.lexicon import NAMES, WORDS
from models.demo_training.names import Language
from models.demo_training.sample import Message, Sample, Target, picture, user
from models.demo_training.scene import Scene, random_scene
from models.demo_training.skills.signatures import TOOLS, Tool, random_city


def call_text(calls: list[dict[str, Any]]) -> str:
    """The calls as the model writes them; also how the evaluation puts parsed calls back into text."""
    blocks = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls]
    return "\n".join(blocks)


def sample_tools(rng: random.Random) -> Sample:
    """A call, now and then two; sometimes the answer to a result; sometimes no tool is needed."""
    language = pick_language(rng)
    offered = rng.sample(TOOLS, rng.choices((1, 2, 3), weights=(3, 4, 3))[0])
    make = rng.choices((_call, _two_calls, _after_result), weights=(7, 1, 2))[0]
    messages, answer, checker, chain = make(rng, offered, language)
    thinks = rng.random() < THINKING_SHARE
    return Sample(
        "tools", messages, answer, checker, chain if thinks else None, [t.definition for t in offered]
    )


def _drawn(rng: random.Random, tool: Tool, language: Language) -> tuple[str, dict[str, Any]]:
    arguments = tool.draw(rng, language)
    return rng.choice(tool.wishes[language]).format(**arguments), {"name": tool.name, "arguments": arguments}


def _call(rng: random.Random, offered: list[Tool], language: Language):  # type: ignore[no-untyped-def]
    wish, call = _drawn(rng, rng.choice(offered), language)
    chain = in_language(language, f"I need {call['name']}.", f"我需要{call['name']}。")
    return [user(wish)], call_text([call]), calls_tools([call]), chain


def _two_calls(rng: random.Random, offered: list[Tool], language: Language):  # type: ignore[no-untyped-def]
    (first, one), (second, two) = (_drawn(rng, rng.choice(offered), language) for _ in range(2))
    chain = in_language(
        language, f"I need {one['name']} and {two['name']}.", f"我需要{one['name']}和{two['name']}。"
    )
    joint = in_language(language, " ", "")
    return [user(first + joint + second)], call_text([one, two]), calls_tools([one, two]), chain


def _after_result(rng: random.Random, offered: list[Tool], language: Language):  # type: ignore[no-untyped-def]
    """The call and its result are history; the answer repeats the result in words."""
    wish, call = _drawn(rng, rng.choice(offered), language)
    value, answer, chain = _result(rng, language)
    history: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call}],
    }
    result: Message = {"role": "tool", "content": json.dumps({"result": value}, ensure_ascii=False)}
    return [user(wish), history, result], answer, contains(str(value)), chain


def _result(rng: random.Random, language: Language) -> tuple[Any, str, str]:
    """What a tool returned, the answer that says it, and the reasoning."""
    value: Any = rng.choice((rng.randint(0, 9999), rng.choice(WORDS), " ".join(rng.sample(WORDS, 2))))
    answer = in_language(language, f"The result is {value}.", f"结果是{value}。")
    return value, answer, in_language(language, f"The tool returned {value}.", f"工具返回了{value}。")


def wish_and_call(
    rng: random.Random, offered: list[Tool], language: Language, two: bool
) -> tuple[str, Target]:
    """What the user says and the calls it needs, with reasoning now and then."""
    (message,), answer, _, chain = (_two_calls if two else _call)(rng, offered, language)
    return message["content"], Target("tools", answer, chain if rng.random() < THINKING_SHARE else None)


def result_and_answer(rng: random.Random, language: Language) -> tuple[Any, Target]:
    value, answer, chain = _result(rng, language)
    return value, Target("tools", answer, chain if rng.random() < THINKING_SHARE else None)


def sample_json(rng: random.Random) -> Sample:
    """A scene or a sentence as JSON of a shape that the question names."""
    language = pick_language(rng)
    return _scene_as_json(rng, language) if rng.random() < 0.5 else _facts_as_json(rng, language)


def _scene_as_json(rng: random.Random, language: Language) -> Sample:
    scene = random_scene(rng, rng.randint(1, 3))
    exercise = scene_exercise(rng, scene, language)
    return conversation(rng, "json", language, [exercise], [picture(scene.render(rng))])


def scene_exercise(rng: random.Random, scene: Scene, language: Language) -> Exercise:
    value = [{"shape": t.shape, "colour": t.colour} for t in scene.things]
    question = vary(
        rng,
        language,
        (
            "List the shapes as JSON with shape and colour.",
            "Describe the picture as JSON.",
            "Give me a JSON list of the shapes with their colour.",
        ),
        ("用JSON列出图形，包含shape和colour。", "用JSON描述这张图片。"),
    )
    chain = in_language(language, f"I see {scene.describe('en')}.", f"我看到{scene.describe('zh')}。")
    same_things = sorted(value, key=str)

    def check(answer: str) -> bool:
        try:
            return sorted(json.loads(answer), key=str) == same_things
        except (ValueError, TypeError):
            return False

    return Exercise(question, json.dumps(value), chain, check)


def _facts_as_json(rng: random.Random, language: Language) -> Sample:
    name, age, city = rng.choice(NAMES[language]), rng.randint(3, 99), random_city(rng, language)
    thing = rng.choice(WORDS)
    facts: dict[str, tuple[Any, str, str]] = {
        "name": (name, f"my name is {name}", f"我叫{name}"),
        "age": (age, f"I am {age}", f"我{age}岁"),
        "city": (city, f"I live in {city}", f"我住在{city}"),
        "likes": (thing, f"I like {thing}", f"我喜欢{thing}"),
    }
    keys = rng.sample(list(facts), rng.randint(2, 4))
    stated = in_language(language, ", ", "，").join(facts[k][1 if language == "en" else 2] for k in keys)
    asked = rng.sample(keys, rng.randint(max(1, len(keys) - 1), len(keys)))
    listed = in_language(language, ", ", "、").join(asked)
    question = vary(
        rng,
        language,
        (
            "Answer as JSON with the keys {listed}: {stated}.",
            "{stated}. Write this as JSON with {listed}.",
            "Extract {listed} as JSON: {stated}.",
        ),
        ("用JSON回答，键为{listed}：{stated}。", "{stated}。请写成包含{listed}的JSON。"),
        listed=listed,
        stated=stated[0].upper() + stated[1:],
    )
    value = {key: facts[key][0] for key in asked}
    chain = in_language(language, f"The keys are {listed}.", f"键是{listed}。")
    exercise = Exercise(question, json.dumps(value, ensure_ascii=False), chain, is_json(value))
    return conversation(rng, "json", language, [exercise])

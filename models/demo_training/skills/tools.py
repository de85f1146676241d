"""Tool calls in the model's own format, tool results put into words, and JSON on request.

One to three signatures stand in the prompt; the right one must be found and its arguments copied from the question.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
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
from models.demo_training.lexicon import CITIES, NAMES, WORDS
from models.demo_training.names import COLOURS, SHAPES, Language
from models.demo_training.sample import Message, Sample, picture, user
from models.demo_training.scene import random_scene

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """A signature, what a user says to want it (slots are its arguments), and how arguments are drawn."""

    name: str
    description: str
    parameters: dict[str, tuple[str, str]]  # name -> (JSON type, description)
    wishes: dict[str, tuple[str, ...]]
    draw: Callable[[random.Random, Language], Arguments]

    @property
    def definition(self) -> dict[str, Any]:
        properties = {
            name: {"type": kind, "description": text} if text else {"type": kind}
            for name, (kind, text) in self.parameters.items()
        }
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        function = {"name": self.name, "description": self.description, "parameters": schema}
        return {"type": "function", "function": function}


def _city(rng: random.Random, language: Language) -> str:
    return rng.choice(CITIES[language])


TOOLS: tuple[Tool, ...] = (
    Tool("get_weather", "Get the weather of a city", {"city": ("string", "City name")},
         {"en": ("What is the weather in {city}?", "How is the weather in {city} today?", "Weather in {city}?"),
          "zh": ("{city}的天气怎么样？", "{city}今天天气如何？")},
         lambda r, g: {"city": _city(r, g)}),
    Tool("get_time", "Get the local time of a city", {"city": ("string", "City name")},
         {"en": ("What time is it in {city}?", "Tell me the time in {city}."), "zh": ("{city}现在几点？", "告诉我{city}的时间。")},
         lambda r, g: {"city": _city(r, g)}),
    Tool("add", "Add two numbers", {"a": ("integer", ""), "b": ("integer", "")},
         {"en": ("Add {a} and {b}.", "What is the sum of {a} and {b}?"), "zh": ("{a}加{b}是多少？", "计算{a}和{b}的和。")},
         lambda r, g: {"a": r.randint(0, 9999), "b": r.randint(0, 9999)}),
    Tool("multiply", "Multiply two numbers", {"a": ("integer", ""), "b": ("integer", "")},
         {"en": ("Multiply {a} by {b}.", "What is the product of {a} and {b}?"), "zh": ("{a}乘以{b}是多少？", "计算{a}和{b}的积。")},
         lambda r, g: {"a": r.randint(0, 999), "b": r.randint(0, 999)}),
    Tool("search", "Search the web", {"query": ("string", "What to look for")},
         {"en": ("Search for {query}.", "Look up {query}.", "Find {query} on the web."), "zh": ("搜索{query}。", "查一下{query}。")},
         lambda r, g: {"query": " ".join(r.sample(WORDS, r.randint(1, 3)))}),
    Tool("set_timer", "Start a timer", {"minutes": ("integer", "Length in minutes")},
         {"en": ("Set a timer for {minutes} minutes.", "Start a {minutes} minute timer."), "zh": ("设置{minutes}分钟的计时器。", "{minutes}分钟后提醒我。")},
         lambda r, g: {"minutes": r.randint(1, 120)}),
    Tool("send_message", "Send a message to a person", {"to": ("string", "Name"), "text": ("string", "Message")},
         {"en": ("Send {to} the message: {text}", "Tell {to}: {text}"), "zh": ("给{to}发消息：{text}", "告诉{to}：{text}")},
         lambda r, g: {"to": r.choice(NAMES[g]), "text": " ".join(r.sample(WORDS, r.randint(1, 4)))}),
    Tool("play_music", "Play a song", {"title": ("string", "Song title")},
         {"en": ("Play {title}.", "Play the song {title}."), "zh": ("播放{title}。", "放一首{title}。")},
         lambda r, g: {"title": " ".join(r.sample(WORDS, r.randint(1, 2)))}),
    Tool("turn_on_light", "Turn on the light of a room", {"room": ("string", "Room"), "colour": ("string", "Colour")},
         {"en": ("Turn the light in the {room} to {colour}.", "Make the {room} light {colour}."),
          "zh": ("把{room}的灯调成{colour}。", "{room}的灯换成{colour}。")},
         lambda r, g: {"room": r.choice(("kitchen", "hall", "office", "garage") if g == "en" else ("厨房", "客厅", "办公室", "卧室")),
                       "colour": r.choice(list(COLOURS.values())).say(g)}),
    Tool("convert", "Convert an amount of money", {"amount": ("integer", ""), "currency": ("string", "Target code")},
         {"en": ("Convert {amount} to {currency}.", "How much is {amount} in {currency}?"), "zh": ("把{amount}换成{currency}。", "{amount}等于多少{currency}？")},
         lambda r, g: {"amount": r.randint(1, 5000), "currency": r.choice(("USD", "EUR", "CNY", "JPY", "GBP"))}),
    Tool("create_note", "Save a note", {"text": ("string", "Content of the note")},
         {"en": ("Write a note: {text}", "Note this: {text}"), "zh": ("写个笔记：{text}", "记下来：{text}")},
         lambda r, g: {"text": " ".join(r.sample(WORDS, r.randint(1, 4)))}),
    Tool("find_shape", "Find a shape in the picture", {"shape": ("string", "Shape"), "colour": ("string", "Colour")},
         {"en": ("Find the {colour} {shape}.", "Look for the {colour} {shape}."), "zh": ("找到{colour}的{shape}。", "找一个{colour}的{shape}。")},
         lambda r, g: {"shape": r.choice(list(SHAPES.values())).say(g), "colour": r.choice(list(COLOURS.values())).say(g)}),
)  # fmt: skip


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
    value: Any = rng.choice((rng.randint(0, 9999), rng.choice(WORDS), " ".join(rng.sample(WORDS, 2))))
    history: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call}],
    }
    result: Message = {"role": "tool", "content": json.dumps({"result": value}, ensure_ascii=False)}
    answer = in_language(language, f"The result is {value}.", f"结果是{value}。")
    chain = in_language(language, f"The tool returned {value}.", f"工具返回了{value}。")
    return [user(wish), history, result], answer, contains(str(value)), chain


def sample_json(rng: random.Random) -> Sample:
    """A scene or a sentence as JSON of a shape that the question names."""
    language = pick_language(rng)
    return _scene_as_json(rng, language) if rng.random() < 0.5 else _facts_as_json(rng, language)


def _scene_as_json(rng: random.Random, language: Language) -> Sample:
    scene = random_scene(rng, rng.randint(1, 3))
    value = [{"shape": t.shape, "colour": t.colour} for t in scene.things]
    question = vary(
        rng,
        language,
        ("List the shapes as JSON with shape and colour.", "Describe the picture as JSON.",
         "Give me a JSON list of the shapes with their colour."),
        ("用JSON列出图形，包含shape和colour。", "用JSON描述这张图片。"),
    )  # fmt: skip
    chain = in_language(language, f"I see {scene.describe('en')}.", f"我看到{scene.describe('zh')}。")
    same_things = sorted(value, key=str)

    def check(answer: str) -> bool:
        try:
            return sorted(json.loads(answer), key=str) == same_things
        except (ValueError, TypeError):
            return False

    exercise = Exercise(question, json.dumps(value), chain, check)
    return conversation(rng, "json", language, [exercise], [picture(scene.render(rng))])


def _facts_as_json(rng: random.Random, language: Language) -> Sample:
    name, age, city = rng.choice(NAMES[language]), rng.randint(3, 99), _city(rng, language)
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
        ("Answer as JSON with the keys {listed}: {stated}.", "{stated}. Write this as JSON with {listed}.",
         "Extract {listed} as JSON: {stated}."),
        ("用JSON回答，键为{listed}：{stated}。", "{stated}。请写成包含{listed}的JSON。"),
        listed=listed, stated=stated[0].upper() + stated[1:],
    )  # fmt: skip
    value = {key: facts[key][0] for key in asked}
    chain = in_language(language, f"The keys are {listed}.", f"键是{listed}。")
    exercise = Exercise(question, json.dumps(value, ensure_ascii=False), chain, is_json(value))
    return conversation(rng, "json", language, [exercise])

"""The tool signatures of the demo's world, what users say to want them, and how their arguments are drawn."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.demo_training.lexicon import CITIES, NAMES, WORDS
from models.demo_training.names import COLOURS, SHAPES, Language

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


def random_city(rng: random.Random, language: Language) -> str:
    return rng.choice(CITIES[language])


TOOLS: tuple[Tool, ...] = (
    Tool(
        "get_weather",
        "Get the weather of a city",
        {"city": ("string", "City name")},
        {
            "en": (
                "What is the weather in {city}?",
                "How is the weather in {city} today?",
                "Weather in {city}?",
            ),
            "zh": ("{city}的天气怎么样？", "{city}今天天气如何？"),
        },
        lambda r, g: {"city": random_city(r, g)},
    ),
    Tool(
        "get_time",
        "Get the local time of a city",
        {"city": ("string", "City name")},
        {
            "en": ("What time is it in {city}?", "Tell me the time in {city}."),
            "zh": ("{city}现在几点？", "告诉我{city}的时间。"),
        },
        lambda r, g: {"city": random_city(r, g)},
    ),
    Tool(
        "add",
        "Add two numbers",
        {"a": ("integer", ""), "b": ("integer", "")},
        {
            "en": ("Add {a} and {b}.", "What is the sum of {a} and {b}?"),
            "zh": ("{a}加{b}是多少？", "计算{a}和{b}的和。"),
        },
        lambda r, g: {"a": r.randint(0, 9999), "b": r.randint(0, 9999)},
    ),
    Tool(
        "multiply",
        "Multiply two numbers",
        {"a": ("integer", ""), "b": ("integer", "")},
        {
            "en": ("Multiply {a} by {b}.", "What is the product of {a} and {b}?"),
            "zh": ("{a}乘以{b}是多少？", "计算{a}和{b}的积。"),
        },
        lambda r, g: {"a": r.randint(0, 999), "b": r.randint(0, 999)},
    ),
    Tool(
        "search",
        "Search the web",
        {"query": ("string", "What to look for")},
        {
            "en": ("Search for {query}.", "Look up {query}.", "Find {query} on the web."),
            "zh": ("搜索{query}。", "查一下{query}。"),
        },
        lambda r, g: {"query": " ".join(r.sample(WORDS, r.randint(1, 3)))},
    ),
    Tool(
        "set_timer",
        "Start a timer",
        {"minutes": ("integer", "Length in minutes")},
        {
            "en": ("Set a timer for {minutes} minutes.", "Start a {minutes} minute timer."),
            "zh": ("设置{minutes}分钟的计时器。", "{minutes}分钟后提醒我。"),
        },
        lambda r, g: {"minutes": r.randint(1, 120)},
    ),
    Tool(
        "send_message",
        "Send a message to a person",
        {"to": ("string", "Name"), "text": ("string", "Message")},
        {
            "en": ("Send {to} the message: {text}", "Tell {to}: {text}"),
            "zh": ("给{to}发消息：{text}", "告诉{to}：{text}"),
        },
        lambda r, g: {"to": r.choice(NAMES[g]), "text": " ".join(r.sample(WORDS, r.randint(1, 4)))},
    ),
    Tool(
        "play_music",
        "Play a song",
        {"title": ("string", "Song title")},
        {"en": ("Play {title}.", "Play the song {title}."), "zh": ("播放{title}。", "放一首{title}。")},
        lambda r, g: {"title": " ".join(r.sample(WORDS, r.randint(1, 2)))},
    ),
    Tool(
        "turn_on_light",
        "Turn on the light of a room",
        {"room": ("string", "Room"), "colour": ("string", "Colour")},
        {
            "en": ("Turn the light in the {room} to {colour}.", "Make the {room} light {colour}."),
            "zh": ("把{room}的灯调成{colour}。", "{room}的灯换成{colour}。"),
        },
        lambda r, g: {
            "room": r.choice(
                ("kitchen", "hall", "office", "garage") if g == "en" else ("厨房", "客厅", "办公室", "卧室")
            ),
            "colour": r.choice(list(COLOURS.values())).say(g),
        },
    ),
    Tool(
        "convert",
        "Convert an amount of money",
        {"amount": ("integer", ""), "currency": ("string", "Target code")},
        {
            "en": ("Convert {amount} to {currency}.", "How much is {amount} in {currency}?"),
            "zh": ("把{amount}换成{currency}。", "{amount}等于多少{currency}？"),
        },
        lambda r, g: {
            "amount": r.randint(1, 5000),
            "currency": r.choice(("USD", "EUR", "CNY", "JPY", "GBP")),
        },
    ),
    Tool(
        "create_note",
        "Save a note",
        {"text": ("string", "Content of the note")},
        {"en": ("Write a note: {text}", "Note this: {text}"), "zh": ("写个笔记：{text}", "记下来：{text}")},
        lambda r, g: {"text": " ".join(r.sample(WORDS, r.randint(1, 4)))},
    ),
    Tool(
        "find_shape",
        "Find a shape in the picture",
        {"shape": ("string", "Shape"), "colour": ("string", "Colour")},
        {
            "en": ("Find the {colour} {shape}.", "Look for the {colour} {shape}."),
            "zh": ("找到{colour}的{shape}。", "找一个{colour}的{shape}。"),
        },
        lambda r, g: {
            "shape": r.choice(list(SHAPES.values())).say(g),
            "colour": r.choice(list(COLOURS.values())).say(g),
        },
    ),
)

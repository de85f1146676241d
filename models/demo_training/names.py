"""The small world: its colours, shapes, places and directions, in English and Chinese.

Words only; how things look is in drawing.py. Every answer a checker compares is made of these names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")


@dataclass(frozen=True)
class Name:
    """One thing's name in both languages; `plural` is English."""

    en: str
    zh: str
    plural: str = ""

    def say(self, language: Language, count: int = 1) -> str:
        if language == "zh":
            return self.zh
        return self.en if count == 1 else (self.plural or f"{self.en}s")


SHAPES: dict[str, Name] = {
    "circle": Name("circle", "圆形"),
    "square": Name("square", "正方形"),
    "triangle": Name("triangle", "三角形"),
    "star": Name("star", "星形"),
    "diamond": Name("diamond", "菱形"),
    "cross": Name("cross", "十字形", "crosses"),
    "heart": Name("heart", "心形"),
    "ring": Name("ring", "圆环"),
}

COLOURS: dict[str, Name] = {
    "red": Name("red", "红色"),
    "green": Name("green", "绿色"),
    "blue": Name("blue", "蓝色"),
    "yellow": Name("yellow", "黄色"),
    "orange": Name("orange", "橙色"),
    "purple": Name("purple", "紫色"),
    "pink": Name("pink", "粉色"),
    "brown": Name("brown", "棕色"),
    "black": Name("black", "黑色"),
    "white": Name("white", "白色"),
}

# A picture's nine places: (column, row) of a 3 x 3 grid.
PLACES: dict[tuple[int, int], Name] = {
    (0, 0): Name("top left", "左上角"),
    (1, 0): Name("top", "上方"),
    (2, 0): Name("top right", "右上角"),
    (0, 1): Name("left", "左边"),
    (1, 1): Name("centre", "中间"),
    (2, 1): Name("right", "右边"),
    (0, 2): Name("bottom left", "左下角"),
    (1, 2): Name("bottom", "下方"),
    (2, 2): Name("bottom right", "右下角"),
}

# Directions of motion as (dx, dy), y downwards.
DIRECTIONS: dict[tuple[int, int], Name] = {
    (1, 0): Name("right", "右"),
    (-1, 0): Name("left", "左"),
    (0, -1): Name("up", "上"),
    (0, 1): Name("down", "下"),
}

NUMBERS_EN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS_ZH = ("零", "一", "两", "三", "四", "五", "六", "七", "八", "九", "十")


def thing(shape: str, colour: str, language: Language, count: int = 1) -> str:
    """'red circle', '红色圆形', 'red circles'."""
    joint = " " if language == "en" else ""
    return f"{COLOURS[colour].say(language)}{joint}{SHAPES[shape].say(language, count)}"


def a_thing(shape: str, colour: str, language: Language) -> str:
    """'a red circle', 'an orange star', '一个红色圆形'."""
    if language == "zh":
        return f"一个{thing(shape, colour, language)}"
    article = "an" if colour[0] in "aeiou" else "a"
    return f"{article} {thing(shape, colour, language)}"


def join(items: list[str], language: Language) -> str:
    """'a, b and c' or 'a、b和c'."""
    if len(items) < 2:
        return "".join(items)
    comma, last = (", ", " and ") if language == "en" else ("、", "和")
    return comma.join(items[:-1]) + last + items[-1]


def sentence(text: str, language: Language) -> str:
    """Give a phrase its capital and its full stop."""
    if language == "zh":
        return text + "。"
    return text[:1].upper() + text[1:] + "."

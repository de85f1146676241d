"""Words of the demo's world: short English words to read and copy, people, cities, things to ask about.

Plain data. The reading skill also makes up letter strings, so the model reads letters and not only these
words.
"""

from __future__ import annotations

import random
from pathlib import Path

WORDS = tuple(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split())

NAMES = {
    "en": (
        "Anna",
        "Ben",
        "Clara",
        "David",
        "Emma",
        "Frank",
        "Grace",
        "Henry",
        "Iris",
        "Jack",
        "Kate",
        "Leo",
        "Maria",
        "Nina",
        "Oscar",
        "Paul",
        "Rosa",
        "Sam",
        "Tom",
        "Vera",
    ),
    "zh": ("小明", "小红", "李华", "王芳", "张伟", "刘洋", "陈静", "赵强", "小丽", "小刚"),
}

CITIES = {
    "en": (
        "Paris",
        "London",
        "Berlin",
        "Tokyo",
        "Rome",
        "Madrid",
        "Oslo",
        "Cairo",
        "Lima",
        "Delhi",
        "Vienna",
        "Prague",
        "Boston",
        "Dublin",
        "Athens",
        "Seoul",
    ),
    "zh": ("北京", "上海", "广州", "深圳", "杭州", "成都", "西安", "南京", "武汉", "重庆"),
}

# What lies outside the demo's world. Subjects fill the slots of requests in skills/chat.py.
SUBJECTS = {
    "en": (
        "France",
        "the moon",
        "quantum physics",
        "love",
        "the stock market",
        "my career",
        "football",
        "history",
        "the Roman empire",
        "a good novel",
        "cooking pasta",
        "politics",
        "climate change",
        "bitcoin",
        "the ocean",
        "black holes",
        "tax law",
        "my headache",
        "Shakespeare",
        "photosynthesis",
        "the weather",
        "medicine",
        "dogs",
        "Italian wine",
        "train times",
        "jazz",
        "the French revolution",
        "democracy",
        "yoga",
        "Mars",
        "the economy",
    ),
    "zh": (
        "法国",
        "月亮",
        "量子物理",
        "爱情",
        "股票",
        "足球",
        "历史",
        "唐朝",
        "小说",
        "做菜",
        "政治",
        "气候变化",
        "比特币",
        "海洋",
        "黑洞",
        "法律",
        "头痛",
        "莎士比亚",
        "光合作用",
        "天气",
        "医学",
        "狗",
        "红酒",
        "火车时刻",
        "音乐",
        "经济",
    ),
}


def letters(rng: random.Random, length: int) -> str:
    """A made-up word, consonants and vowels in turn; no letter that looks like another one."""
    consonants, vowels = "bcdfghkmnprstvwz", "aeou"
    start = rng.randint(0, 1)
    return "".join(rng.choice((consonants, vowels)[(i + start) % 2]) for i in range(length))

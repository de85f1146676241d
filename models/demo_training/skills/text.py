"""Text only: simple arithmetic, repeating words, counting words and letters."""

from __future__ import annotations

import random

from models.demo_training.checkers import is_number, says_exactly
from models.demo_training.dialogue import Exercise, conversation, in_language, pick_language, vary
from models.demo_training.lexicon import NAMES, WORDS, letters
from models.demo_training.names import Language, sentence
from models.demo_training.sample import Sample


def sample_arithmetic(rng: random.Random) -> Sample:
    language = pick_language(rng)
    return conversation(rng, "arithmetic", language, [arithmetic_exercise(rng, language)])


def arithmetic_exercise(rng: random.Random, language: Language) -> Exercise:
    """Sums and differences up to 99, products of one-digit numbers, exact quotients."""
    operation = rng.choice("++--*/")
    if operation == "*":
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        result = a * b
    elif operation == "/":
        b, result = rng.randint(1, 10), rng.randint(0, 10)
        a = b * result
    else:
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        if operation == "-":
            a, b = max(a, b), min(a, b)
        result = a + b if operation == "+" else a - b
    return _asked(rng, operation, a, b, result, language)


def _asked(rng: random.Random, operation: str, a: int, b: int, result: int, language: Language) -> Exercise:
    word_en = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[operation]
    word_zh = {"+": "加", "-": "减", "*": "乘以", "/": "除以"}[operation]
    sign = rng.choice({"*": "*×x", "/": "/÷"}.get(operation, operation))
    question = vary(
        rng,
        language,
        (
            "What is {a} {sign} {b}?",
            "{a} {sign} {b} = ?",
            "{a}{sign}{b}=",
            "What is {a} {word} {b}?",
            "Calculate {a} {sign} {b}.",
            "How much is {a} {word} {b}?",
        ),
        (
            "{a}{sign}{b}等于多少？",
            "{a} {sign} {b} = ?",
            "计算{a}{word}{b}。",
            "{a}{word}{b}是多少？",
            "{a}{sign}{b}=?",
        ),
        a=a,
        b=b,
        sign=sign,
        word=in_language(language, word_en, word_zh),
    )
    answer = sentence(str(result), language)
    return Exercise(question, answer, _arithmetic_chain(operation, a, b, result, language), is_number(result))


def _arithmetic_chain(operation: str, a: int, b: int, result: int, language: Language) -> str:
    """Tens and ones apart for sums and differences: steps that a small model can learn."""
    if operation in "+-":
        tens_b, ones_b = b // 10 * 10, b % 10
        middle = a + tens_b if operation == "+" else a - tens_b
        steps = f"{a} {operation} {tens_b} = {middle}, {middle} {operation} {ones_b} = {result}"
    else:
        steps = f"{a} {'×' if operation == '*' else '÷'} {b} = {result}"
    return sentence(steps, language)


def sample_repeat(rng: random.Random) -> Sample:
    language = pick_language(rng)
    return conversation(rng, "repeat", language, [repeat_exercise(rng, language)])


def repeat_exercise(rng: random.Random, language: Language) -> Exercise:
    make = rng.choices((_repeat, _repeat_times, _count_words, _count_letters), weights=(4, 2, 2, 2))[0]
    return make(rng, language)


def _some_words(rng: random.Random, most: int) -> list[str]:
    return [
        rng.choice(WORDS) if rng.random() < 0.8 else letters(rng, rng.randint(3, 6))
        for _ in range(rng.randint(1, most))
    ]


def _repeat(rng: random.Random, language: Language) -> Exercise:
    """Words, digits or a name, to be copied exactly."""
    what = rng.choice(
        (
            " ".join(_some_words(rng, 5)),
            " ".join(_some_words(rng, 3)),
            str(rng.randint(0, 999999)),
            rng.choice(NAMES[language]),
        )
    )
    question = vary(
        rng,
        language,
        ("Repeat: {what}", "Say '{what}'.", "Repeat after me: {what}", "Please write: {what}"),
        ("重复：{what}", "请说“{what}”。", "跟我说：{what}", "请写：{what}"),
        what=what,
    )
    chain = in_language(language, "I copy the text.", "我照抄这段文字。")
    return Exercise(question, what, chain, says_exactly(what))


def _repeat_times(rng: random.Random, language: Language) -> Exercise:
    word, times = rng.choice(WORDS), rng.randint(2, 6)
    question = vary(
        rng,
        language,
        ("Say {word} {times} times.", "Repeat '{word}' {times} times.", "Write {word} {times} times."),
        ("把{word}说{times}遍。", "重复“{word}”{times}次。", "写{times}遍{word}。"),
        word=word,
        times=times,
    )
    answer = " ".join([word] * times)
    chain = in_language(language, f"{times} times {word}.", f"{times}遍{word}。")
    return Exercise(question, answer, chain, says_exactly(answer))


def _count_words(rng: random.Random, language: Language) -> Exercise:
    words = _some_words(rng, 8)
    question = vary(
        rng,
        language,
        ("How many words are here: {words}", "Count the words: {words}", "How many words? {words}"),
        ("这里有几个单词：{words}", "数一数单词：{words}"),
        words=" ".join(words),
    )
    counted = ", ".join(f"{i} {word}" for i, word in enumerate(words, 1))
    answer = sentence(str(len(words)), language)
    return Exercise(question, answer, sentence(counted, language), is_number(len(words)))


def _count_letters(rng: random.Random, language: Language) -> Exercise:
    """Letter by letter, written with blanks so that every letter is a token of its own."""
    letter = rng.choice("abcde")
    count = rng.randint(1, 7)
    others = [rng.choice("abcde") for _ in range(rng.randint(0, 4))]
    row = [letter] * count + [o for o in others if o != letter]
    rng.shuffle(row)
    question = vary(
        rng,
        language,
        ("How many {letter} are in: {row}", "Count the letter {letter}: {row}"),
        ("这里有几个{letter}：{row}", "数一数字母{letter}：{row}"),
        letter=letter,
        row=" ".join(row),
    )
    running, steps = 0, []
    for item in row:
        running += item == letter
        steps.append(f"{item} {running}")
    return Exercise(
        question, sentence(str(count), language), sentence(", ".join(steps), language), is_number(count)
    )

"""Read what is written in a picture: one to six digits or a short word, at any place, in many faces."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw

from models.demo_training import drawing, fonts
from models.demo_training.checkers import both, contains_word, is_number, says_exactly
from models.demo_training.dialogue import Exercise, conversation, in_language, pick_language, vary
from models.demo_training.finish import finish, picture_size
from models.demo_training.lexicon import WORDS, letters
from models.demo_training.names import SHAPES, Language
from models.demo_training.regions import Region, describe, shape_region
from models.demo_training.sample import Sample, picture

SIDES = (84, 240)
MIN_TEXT_HEIGHT = 14  # pixels of the font size in the final picture; smaller glyphs blur under JPEG
OPEN_SHARE = 0.15  # of questions that do not say that there is something to read
ASK_NUMBER = (
    (
        "What number is in the picture?",
        "Which number do you see?",
        "Read the number.",
        "What is the number?",
        "What number is written here?",
        "Read this.",
    ),
    ("图中的数字是多少？", "读出这个数字。", "图片里写的是什么数字？", "你看到什么数字？"),
)
ASK_WORD = (
    (
        "What word is in the picture?",
        "Which word do you see?",
        "Read the word.",
        "What does it say?",
        "What is written here?",
        "Read the text in this image.",
        "Read this.",
    ),
    ("图中写的是什么单词？", "读出这个单词。", "图片里写了什么？", "上面写着什么？"),
)
INK_CONTRAST = 150.0  # thin strokes need more than filled shapes do
BOXES = "boxes"
Box = tuple[float, float, float, float]  # left, top, right, bottom
INK = ("black", "white", "red", "green", "blue", "purple", "brown", "orange")


def sample_digits(rng: random.Random) -> Sample:
    language, number = pick_language(rng), random_number(rng)
    exercise = number_exercise(rng, number, language)
    return conversation(rng, "digits", language, [exercise], [picture(text_picture(rng, number))])


def number_exercise(rng: random.Random, number: str, language: Language) -> Exercise:
    if rng.random() < OPEN_SHARE:
        question = _open_question(rng, language)
        answer = in_language(language, f"The number {number}.", f"数字{number}。")
        checker = is_number(float(number))
    else:
        question = vary(rng, language, *ASK_NUMBER)
        answer, checker = number, both(says_exactly(number), is_number(float(number)))
    return Exercise(question, answer, _spelling_chain(number, language), checker)


def sample_words(rng: random.Random) -> Sample:
    language, word = pick_language(rng), random_word(rng)
    exercise = word_exercise(rng, word, language)
    return conversation(rng, "words", language, [exercise], [picture(text_picture(rng, word))])


def word_exercise(rng: random.Random, word: str, language: Language) -> Exercise:
    if rng.random() < OPEN_SHARE:
        question = _open_question(rng, language)
        answer = in_language(language, f"The word {word}.", f"单词{word}。")
        checker = contains_word(word)
    else:
        question = vary(rng, language, *ASK_WORD)
        answer, checker = word, says_exactly(word)
    return Exercise(question, answer, _spelling_chain(word, language), checker, spelled=word)


def _open_question(rng: random.Random, language: Language) -> str:
    """What people ask before they know what there is."""
    return vary(
        rng, language, ("What is in the picture?", "What do you see?"), ("图片里有什么？", "你看到了什么？")
    )


def random_number(rng: random.Random, most_digits: int = 6) -> str:
    """Every length equally often; no leading zero, so the number and its digits are the same text."""
    length = rng.randint(1, most_digits)
    return str(rng.randint(0 if length == 1 else 10 ** (length - 1), 10**length - 1))


def random_word(rng: random.Random) -> str:
    """Two in three from the lexicon, else made up; lower case, upper case or capitalised."""
    word = rng.choice(WORDS) if rng.random() < 0.65 else letters(rng, rng.randint(3, 7))
    return rng.choices((word, word.upper(), word.capitalize()), weights=(3, 1, 1))[0]


def _spelling_chain(written: str, language: Language) -> str:
    spelled = " ".join(written)
    return in_language(language, f"I read: {spelled}.", f"我读到：{spelled}。")


def text_picture(
    rng: random.Random, written: str, sides: tuple[int, int] = SIDES, with_shape: float = 0.15
) -> Image.Image:
    """One text at a random place, size, slant and colour; now and then a shape beside it."""
    ink = rng.choice(INK)
    background = drawing.background_for(rng, [ink], INK_CONTRAST)
    face = fonts.random_face(rng)
    size, stamp = _fitting_stamp(rng, written, face, sides, drawing.jitter(rng, drawing.RGB[ink]))
    canvas = drawing.halve(drawing.blank(rng, size, background))
    left = rng.randint(0, size[0] - stamp.width)
    top = rng.randint(0, size[1] - stamp.height)
    beside: list[Region] = []
    if rng.random() < with_shape:
        beside = _shape_beside(rng, canvas, (left, top, left + stamp.width, top + stamp.height), background)
    canvas.paste(stamp, (left, top), stamp)
    letters_told = letter_regions(written, stamp, (left, top), size)
    return describe(finish(rng, canvas), [*beside, *letters_told])


def letter_regions(
    written: str, stamp: Image.Image, corner: tuple[int, int], size: tuple[int, int]
) -> list[Region]:
    """Where the characters of a stamp of `render_text` are, pasted at `corner` of a picture of `size`."""
    (left, top), (width, height) = corner, size
    return [
        Region(character, None, (left + x0) / width, (top + y0) / height, (left + x1) / width,
               (top + y1) / height, order)
        for order, (character, (x0, y0, x1, y1)) in enumerate(zip(written, stamp.info[BOXES], strict=True))
    ]  # fmt: skip


def _fitting_stamp(
    rng: random.Random, written: str, face: fonts.Face, sides: tuple[int, int], ink: drawing.Colour
) -> tuple[tuple[int, int], Image.Image]:
    """A picture size and the text as an RGBA stamp that fits into it."""
    while True:
        size = picture_size(rng, sides, may_be_large=False)
        largest = min(0.6 * size[1], 1.7 * size[0] / (len(written) + 0.6))
        if largest < MIN_TEXT_HEIGHT:
            continue
        height = int(
            rng.triangular(MIN_TEXT_HEIGHT, largest, min(largest, max(MIN_TEXT_HEIGHT, 0.75 * largest)))
        )
        stamp = render_text(written, face, height, ink, rng.uniform(-7, 7) if rng.random() < 0.3 else 0.0)
        if stamp.width <= size[0] - 4 and stamp.height <= size[1] - 2:
            return size, stamp


def render_text(
    written: str, face: fonts.Face, height: int, ink: drawing.Colour, degrees: float
) -> Image.Image:
    """The text alone on a transparent ground, cropped to its glyphs plus two pixels.

    `info[BOXES]` has the box of every character, in pixels from the stamp's corner.
    """
    font = fonts.load(face, height)
    left, top, right, bottom = font.getbbox(written)
    stamp = Image.new("RGBA", (int(right - left) + 4, int(bottom - top) + 4), (*ink, 0))
    ImageDraw.Draw(stamp).text((2 - left, 2 - top), written, font=font, fill=(*ink, 255))
    edges = [2 - left + font.getlength(written[:i]) for i in range(len(written) + 1)]
    boxes = [(edges[i], 2.0, edges[i + 1], stamp.height - 2.0) for i in range(len(written))]
    if degrees:
        upright = stamp.size
        stamp = stamp.rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=(*ink, 0))
        boxes = [_turned(box, degrees, upright, stamp.size) for box in boxes]
    stamp.info[BOXES] = boxes
    return stamp


def _turned(box: Box, degrees: float, before: tuple[int, int], after: tuple[int, int]) -> Box:
    """The box around a box that is turned with its picture, anticlockwise about the middle."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = [(x - before[0] / 2, y - before[1] / 2) for x in box[0::2] for y in box[1::2]]
    across = [after[0] / 2 + x * cos + y * sin for x, y in corners]
    down = [after[1] / 2 - x * sin + y * cos for x, y in corners]
    return min(across), min(down), max(across), max(down)


def lines_picture(rng: random.Random, written: list[str], width: int) -> Image.Image:
    """One text below the other, each with a face, a size, an ink and a place of its own."""
    background = drawing.background_for(rng, [rng.choice(INK)], INK_CONTRAST)
    inks = [i for i in INK if drawing.distance(drawing.RGB[i], background) >= INK_CONTRAST]
    stamps = [
        _line_stamp(rng, text, width - 4, drawing.jitter(rng, drawing.RGB[rng.choice(inks)]))
        for text in written
    ]
    gaps = [rng.randint(2, 9) for _ in range(len(stamps) + 1)]
    size = (width, max(56, sum(gaps) + sum(stamp.height for stamp in stamps)))
    canvas = drawing.halve(drawing.blank(rng, size, background))
    top, regions = gaps[0], []
    for text, stamp, gap in zip(written, stamps, gaps[1:], strict=True):
        left = rng.randint(0, width - stamp.width)
        canvas.paste(stamp, (left, top), stamp)
        regions += letter_regions(text, stamp, (left, top), size)
        top += stamp.height + gap
    return describe(finish(rng, canvas), regions)


def _line_stamp(rng: random.Random, text: str, width: int, ink: drawing.Colour) -> Image.Image:
    while True:
        height = rng.randint(MIN_TEXT_HEIGHT, 2 * MIN_TEXT_HEIGHT)
        stamp = render_text(text, fonts.random_face(rng), height, ink, 0.0)
        if stamp.width <= width:
            return stamp


def _shape_beside(
    rng: random.Random, canvas: Image.Image, text_box: tuple[int, int, int, int], background: drawing.Colour
) -> list[Region]:
    """A small distracting shape that does not touch the text, if there is room; what it is."""
    colours = [
        c for c, rgb in drawing.RGB.items() if drawing.distance(rgb, background) >= drawing.MIN_CONTRAST
    ]
    radius = rng.uniform(0.06, 0.12) * min(canvas.size)
    for _ in range(12):
        x, y = rng.uniform(radius, canvas.width - radius), rng.uniform(radius, canvas.height - radius)
        inside_x = text_box[0] - radius - 2 < x < text_box[2] + radius + 2
        inside_y = text_box[1] - radius - 2 < y < text_box[3] + radius + 2
        if not (inside_x and inside_y):
            half = drawing.OVERSAMPLING  # the canvas is in final pixels already
            shape, colour = rng.choice(list(SHAPES)), rng.choice(colours)
            drawing.draw_shape(canvas, shape, drawing.RGB[colour], (x / half, y / half), radius / half)
            return [shape_region(shape, colour, (x, y), radius, canvas.size)]
    return []

"""Clips: which way something moves, how often it flashes, the order of its colours, when something happens.

Frames are at most 16 in most clips, so the server's frame choice keeps them all; the events of longer clips
last long enough to survive it. The time is not drawn here: the server stamps every frame itself.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from PIL import Image

from models.demo_training import drawing
from models.demo_training.checkers import is_number, names_in_order, names_only, says
from models.demo_training.dialogue import Exercise, conversation, in_language, lesson, pick_language, vary
from models.demo_training.finish import FRAME, LARGE_FRAME, finish, picture_size
from models.demo_training.names import COLOURS, DIRECTIONS, SHAPES, Language, a_thing, join, sentence, thing
from models.demo_training.regions import KEY, describe, shape_region
from models.demo_training.sample import Clip, Sample, video
from models.demo_training.scene import MAX_TILT, compatible_colours

RATES = (2.0, 4.0, 5.0, 10.0)  # frames per second; slower ones would be sampled with repeats
SHORT = (6, 16)  # frames of a clip that is used whole
LONG = (17, 30)
LARGE_SHARE = 0.05
TIMED = (126, 190)  # sides of frames whose time must be read
TIMED_ON_DARK = (200, 260)
SIDES_ZH = {"left": "左边", "right": "右边", "top": "上方", "bottom": "下方"}
EVENTS_ZH = {"appear": "出现", "disappear": "消失", "change its colour": "变色"}
TIMESTAMP_SHARE = 0.16  # of the height, at the top: things stay below it so the stamp covers nothing


@dataclass(frozen=True)
class Filmed:
    """A clip of `count` frames that is not rendered yet, its question, and easier ones for lessons."""

    exercise: Exercise
    count: int
    draw: Callable[[int], Image.Image]
    easier: list[Exercise]
    rate: float | None = None  # frames per second; None for any


Film = Callable[[random.Random, Language], Filmed]


def sample_motion(rng: random.Random) -> Sample:
    return _asked(rng, "motion", motion)


def sample_flashes(rng: random.Random) -> Sample:
    return _asked(rng, "flashes", flashes)


def sample_colour_order(rng: random.Random) -> Sample:
    return _asked(rng, "colour_order", colour_order)


def sample_moment(rng: random.Random) -> Sample:
    return _asked(rng, "moment", moment)


def clip_lesson(rng: random.Random, sides: tuple[int, int]) -> Sample:
    """Every question about one clip, the hard one twice: with thinking or without, as it falls."""
    skill, film = rng.choice((("motion", motion), ("flashes", flashes), ("flashes", flashes),
                              ("colour_order", colour_order)))  # fmt: skip
    return _taught(rng, skill, partial(film, sides=sides))


def moment_lesson(rng: random.Random) -> Sample:
    return _taught(rng, "moment", moment)


def _asked(rng: random.Random, skill: str, film: Film) -> Sample:
    language = pick_language(rng)
    filmed = film(rng, language)
    return conversation(rng, skill, language, [filmed.exercise], [video(_render(rng, filmed))])


def _taught(rng: random.Random, skill: str, film: Film) -> Sample:
    language = pick_language(rng)
    filmed = film(rng, language)
    exercises = [(skill, e) for e in (filmed.exercise, *filmed.easier, filmed.exercise)]
    return lesson(rng, language, exercises, [video(_render(rng, filmed))])


def _render(rng: random.Random, filmed: Filmed) -> Clip:
    """All frames; wear is drawn once per clip, or a whole clip stays clean."""
    worn, count, rate = rng.random() < 0.4, filmed.count, filmed.rate
    clean = [filmed.draw(i) for i in range(count)]
    frames = tuple(describe(finish(rng, f), f.info[KEY]) if worn else f for f in clean)
    if rate is None:
        rate = rng.choice(RATES if count <= SHORT[1] else (RATES[0], float(math.ceil(count / 8))))
    return Clip(frames, rate)


def motion(rng: random.Random, language: Language, sides: tuple[int, int] = FRAME) -> Filmed:
    shape, colour, background = _look(rng)
    step = rng.choice(list(DIRECTIONS))
    count = rng.randint(*(SHORT if rng.random() < 0.8 else LONG))
    size, radius = _frame_size(rng, sides)
    start, end = _path(rng, step, size, radius)
    still = rng.random() < 0.1
    tilt = rng.uniform(-MAX_TILT, MAX_TILT)

    def draw(index: int) -> Image.Image:
        share = 0.0 if still else index / (count - 1)
        centre = (start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1]))
        return _frame(size, background, [(shape, colour, centre, radius, tilt)], (0, 0) if still else step)

    question = vary(
        rng,
        language,
        (
            "Which way does the {shape} move?",
            "In which direction does it move?",
            "Where does the {shape} go?",
            "What happens in the clip?",
            "How does the {shape} move?",
        ),
        ("{shape}往哪个方向移动？", "它往哪边移动？", "视频里发生了什么？", "{shape}怎么移动？"),
        shape=SHAPES[shape].say(language),
    )
    what = thing(shape, colour, language)
    if still:
        easier = [_fact(language, "What is it?", "它是什么？", a_thing(shape, colour, language))]
        return Filmed(_still_exercise(question, what, language), count, draw, easier)
    return Filmed(
        _moving_exercise(question, what, step, language), count, draw, _ends(step, shape, colour, language)
    )


def _fact(language: Language, en: str, zh: str, answer: str) -> Exercise:
    """A question of lessons: one phrasing, no chain."""
    said = sentence(answer, language)
    return Exercise(in_language(language, en, zh), said, "", says(said))


def _ends(step: tuple[int, int], shape: str, colour: str, language: Language) -> list[Exercise]:
    """What moves, and where it is at both ends of its way."""
    first, last = _sides_of(step)
    at = {side: in_language(language, f"at the {side}", f"在{SIDES_ZH[side]}") for side in SIDES_ZH}
    name = SHAPES[shape].say(language)
    return [
        _fact(language, "What moves?", "什么在移动？", a_thing(shape, colour, language)),
        _fact(language, f"Where is the {name} at first?", f"{name}先在哪里？", at[first]),
        _fact(language, f"Where is the {name} at the end?", f"{name}后来在哪里？", at[last]),
    ]


def _sides_of(step: tuple[int, int]) -> tuple[str, str]:
    """Where it starts and where it ends."""
    first, last = ("left", "right") if step[1] == 0 else ("top", "bottom")
    return (last, first) if step in ((-1, 0), (0, -1)) else (first, last)


def _moving_exercise(question: str, what: str, step: tuple[int, int], language: Language) -> Exercise:
    name = DIRECTIONS[step]
    to = f"to the {name.en}" if step[1] == 0 else name.en
    answer = in_language(language, f"It moves {to}.", f"它向{name.zh}移动。")
    start, end = _sides_of(step)
    chain = in_language(
        language,
        f"The {what} is first at the {start}, then at the {end}.",
        f"{what}先在{SIDES_ZH[start]}，后来在{SIDES_ZH[end]}。",
    )
    return Exercise(question, answer, chain, names_only([step], DIRECTIONS))


def _still_exercise(question: str, what: str, language: Language) -> Exercise:
    answer = in_language(language, "It does not move.", "它没有移动。")
    chain = in_language(language, f"The {what} stays at the same place.", f"{what}一直在同一个位置。")

    def check(said: str) -> bool:
        return "not move" in said.casefold() or "没有移动" in said

    return Exercise(question, answer, chain, check)


def flashes(rng: random.Random, language: Language, sides: tuple[int, int] = FRAME) -> Filmed:
    """A thing that is there in some frames and not in others; from one to six times."""
    shape, colour, background = _look(rng)
    times = rng.randint(1, 6)
    on, off = [rng.randint(1, 2) for _ in range(times)], [rng.randint(1, 2) for _ in range(times + 1)]
    while sum(on) + sum(off) > SHORT[1]:
        on, off = [1] * times, [max(1, o - 1) for o in off]
    pattern = [False] * off[0]
    for i in range(times):
        pattern += [True] * on[i] + [False] * off[i + 1]
    numbers = _numbered(pattern)
    size, radius = _frame_size(rng, sides)
    centre, tilt = _centre(rng, size, radius), rng.uniform(-MAX_TILT, MAX_TILT)

    def draw(index: int) -> Image.Image:
        things = [(shape, colour, centre, radius, tilt)] if pattern[index] else []
        return _frame(size, background, things, turn=numbers[index])

    question = vary(
        rng,
        language,
        (
            "How many times does the {shape} flash?",
            "How often does it flash?",
            "How many flashes are there?",
            "Count the flashes.",
        ),
        ("{shape}闪了几次？", "一共闪了多少次？", "数一数闪了几次。"),
        shape=SHAPES[shape].say(language),
    )
    answer = in_language(
        language, f"It flashes {times} {'times' if times > 1 else 'time'}.", f"它闪了{times}次。"
    )
    marks = [in_language(language, f"on {n}" if n else "off", f"亮{n}" if n else "暗") for n in numbers]
    chain = in_language(language, f"Frame by frame: {', '.join(marks)}.", f"逐帧看：{'、'.join(marks)}。")
    listed = Exercise(in_language(language, "Go frame by frame.", "逐帧说明。"), chain, "", says(chain))
    what = _fact(language, "What flashes?", "什么在闪？", a_thing(shape, colour, language))
    return Filmed(Exercise(question, answer, chain, is_number(times)), len(pattern), draw, [listed, what])


def _numbered(pattern: list[bool]) -> list[int]:
    """Which flash every frame belongs to, from 1; 0 between them."""
    begins = [on and not before for before, on in zip([False, *pattern], pattern, strict=False)]
    return [sum(begins[: i + 1]) if on else 0 for i, on in enumerate(pattern)]


def colour_order(rng: random.Random, language: Language, sides: tuple[int, int] = FRAME) -> Filmed:
    """A thing changes its colour one to three times."""
    shape, _, background = _look(rng)
    visible = [c for c in COLOURS if drawing.distance(drawing.RGB[c], background) >= drawing.MIN_CONTRAST]
    colours = rng.sample(visible, rng.randint(2, 4))
    lengths = [rng.randint(2, 4 if rng.random() < 0.8 else 7) for _ in colours]
    owner = [colour for colour, length in zip(colours, lengths, strict=True) for _ in range(length)]
    size, radius = _frame_size(rng, sides)
    centre, tilt = _centre(rng, size, radius), rng.uniform(-MAX_TILT, MAX_TILT)

    def draw(index: int) -> Image.Image:
        turn = 1 + colours.index(owner[index])
        return _frame(size, background, [(shape, owner[index], centre, radius, tilt)], turn=turn)

    question = vary(
        rng,
        language,
        (
            "Which colours does the {shape} have, in order?",
            "In what order do the colours appear?",
            "List the colors in order.",
            "How does the colour of the {shape} change?",
        ),
        ("{shape}的颜色按顺序是什么？", "颜色出现的顺序是什么？", "{shape}的颜色怎么变化？"),
        shape=SHAPES[shape].say(language),
    )
    names = [COLOURS[c].say(language) for c in colours]
    answer = sentence(in_language(language, ", then ", "，然后").join(names), language)
    chain = in_language(
        language,
        f"There are {len(colours)} colours: {join(names, 'en')}.",
        f"有{len(colours)}种颜色：{join(names, 'zh')}。",
    )
    easier = [
        _fact(language, "Which colour comes first?", "先是什么颜色？", names[0]),
        _fact(language, "Which colour comes last?", "最后是什么颜色？", names[-1]),
    ]
    return Filmed(
        Exercise(question, answer, chain, names_in_order(colours, COLOURS)), len(owner), draw, easier
    )


def moment(rng: random.Random, language: Language) -> Filmed:
    """A thing appears, vanishes or changes its colour in one frame; the answer is that frame's time."""
    shape, colour, background = _look(rng)
    count, rate = rng.randint(8, SHORT[1]), rng.choice(RATES)
    changed = rng.randint(1, count - 2)
    event = rng.choice(list(EVENTS_ZH))
    visible = [c for c in COLOURS if drawing.distance(drawing.RGB[c], background) >= drawing.MIN_CONTRAST]
    other = rng.choice([c for c in visible if c != colour])
    size, radius = _frame_size(rng, _sides_to_read_time(background))
    centre, tilt = _centre(rng, size, radius), rng.uniform(-MAX_TILT, MAX_TILT)

    def draw(index: int) -> Image.Image:
        after = index >= changed
        if (event == "appear" and not after) or (event == "disappear" and after):
            return _frame(size, background, [])
        shown = other if event == "change its colour" and after else colour
        return _frame(size, background, [(shape, shown, centre, radius, tilt)])

    exercise = _moment_exercise(rng, event, shape, changed / rate, language)
    last = in_language(language, f"at {(count - 1) / rate:g} seconds", f"在{(count - 1) / rate:g}秒")
    easier = [
        _fact(language, "When is the last frame?", "最后一帧在第几秒？", last),
        _fact(language, "Which thing is it?", "是什么东西？", a_thing(shape, colour, language)),
    ]
    return Filmed(exercise, count, draw, easier, rate)


def _moment_exercise(
    rng: random.Random, event: str, shape: str, seconds: float, language: Language
) -> Exercise:
    question = vary(
        rng,
        language,
        (
            "When does the {shape} {event}?",
            "At what time does the {shape} {event}?",
            "At which second does the {shape} {event}?",
        ),
        ("{shape}什么时候{event}？", "{shape}在第几秒{event}？"),
        shape=SHAPES[shape].say(language),
        event=in_language(language, event, EVENTS_ZH[event]),
    )
    answer = in_language(language, f"At {seconds:g} seconds.", f"在{seconds:g}秒。")
    stamp = f"{int(seconds // 60):02d}:{seconds % 60:05.2f}"
    chain = in_language(
        language,
        f"The first frame after the change shows 00:{stamp}.",
        f"变化后的第一帧显示00:{stamp}。",
    )
    return Exercise(question, answer, chain, is_number(seconds))


def _look(rng: random.Random) -> tuple[str, str, drawing.Colour]:
    colour = rng.choice(compatible_colours(rng))
    return rng.choice(list(SHAPES)), colour, drawing.background_for(rng, [colour])


def _frame_size(rng: random.Random, sides: tuple[int, int]) -> tuple[tuple[int, int], float]:
    """Of a clip, and the radius of the thing in it, in pixels."""
    if rng.random() < LARGE_SHARE:
        sides = LARGE_FRAME
    size = picture_size(rng, sides, max_aspect=1.6, may_be_large=False)
    return size, rng.uniform(0.14, 0.22) * min(size)


def _sides_to_read_time(background: drawing.Colour) -> tuple[int, int]:
    """The stamp is black, a tenth of the frame high; small frames have no pixels for its white rim."""
    return TIMED_ON_DARK if sum(background) < 3 * 100 else TIMED


def _area(size: tuple[int, int], radius: float) -> tuple[float, float, float, float]:
    """Where a centre may be: inside the frame and below the time stamp."""
    return radius + 1, TIMESTAMP_SHARE * size[1] + radius, size[0] - radius - 1, size[1] - radius - 1


def _centre(rng: random.Random, size: tuple[int, int], radius: float) -> tuple[float, float]:
    left, top, right, bottom = _area(size, radius)
    return rng.uniform(left, right), rng.uniform(top, bottom)


def _path(
    rng: random.Random, step: tuple[int, int], size: tuple[int, int], radius: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Two ends that differ along the direction only, by at least half of the free way."""
    left, top, right, bottom = _area(size, radius)
    low, high = (left, right) if step[0] else (top, bottom)
    way = (high - low) * rng.uniform(0.5, 1.0)
    first = rng.uniform(low, high - way)
    ends = (first, first + way) if sum(step) > 0 else (first + way, first)
    across = rng.uniform(top, bottom) if step[0] else rng.uniform(left, right)
    if step[0]:
        return (ends[0], across), (ends[1], across)
    return (across, ends[0]), (across, ends[1])


Placed = tuple[str, str, tuple[float, float], float, float]


def _frame(
    size: tuple[int, int],
    background: drawing.Colour,
    things: list[Placed],
    motion: tuple[int, int] = (0, 0),
    turn: int | None = None,
) -> Image.Image:
    canvas = Image.new("RGB", (size[0] * drawing.OVERSAMPLING, size[1] * drawing.OVERSAMPLING), background)
    for shape, colour, centre, radius, tilt in things:
        drawing.draw_shape(canvas, shape, drawing.RGB[colour], centre, radius, tilt)
    regions = [shape_region(t[0], t[1], t[2], t[3], size, motion, turn) for t in things]
    return describe(drawing.halve(canvas), regions)

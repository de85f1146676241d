"""A scene: which things stand where in one picture, without overlap, and the picture of it.

The scene is the truth that questions and answers are made from. Positions are fractions of the picture, so a
scene can be drawn at any size; radii are fractions of the shorter side.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass

from PIL import Image

from models.demo_training import drawing
from models.demo_training.finish import SINGLE, finish, picture_size
from models.demo_training.names import COLOURS, PLACES, SHAPES, Language, a_thing, join, thing
from models.demo_training.regions import Region, describe, shape_region

MAX_TILT = 0.22  # radians; more would turn a square into a diamond
MIN_RADIUS_PIXELS = 8.0


@dataclass(frozen=True)
class Thing:
    """x, y in [0, 1] of width and height; radius as a fraction of the shorter side."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    tilt: float = 0.0

    def say(self, language: Language) -> str:
        return thing(self.shape, self.colour, language)

    def a(self, language: Language) -> str:
        return a_thing(self.shape, self.colour, language)

    @property
    def place(self) -> tuple[int, int]:
        """Its cell of the 3 x 3 grid."""
        return min(2, int(self.x * 3)), min(2, int(self.y * 3))

    def where(self, language: Language) -> str:
        return PLACES[self.place].say(language)


@dataclass(frozen=True)
class Scene:
    """Things in reading order: left to right."""

    size: tuple[int, int]
    things: tuple[Thing, ...]

    def of(self, shape: str | None = None, colour: str | None = None) -> list[Thing]:
        return [t for t in self.things if shape in (None, t.shape) and colour in (None, t.colour)]

    def describe(self, language: Language) -> str:
        """'a red circle and 2 blue stars', left to right by first appearance; 'nothing' when empty."""
        counts = Counter((t.shape, t.colour) for t in self.things)
        phrases = []
        for (shape, colour), count in counts.items():
            if count == 1:
                phrases.append(a_thing(shape, colour, language))
            else:
                measure = "个" if language == "zh" else " "
                phrases.append(f"{count}{measure}{thing(shape, colour, language, count)}")
        return join(phrases, language)

    def render(self, rng: random.Random, worn: bool = True) -> Image.Image:
        """The picture; `worn` adds noise, blur or compression."""
        background = drawing.background_for(rng, [t.colour for t in self.things])
        canvas = drawing.blank(rng, self.size, background)
        width, height = self.size
        for t in self.things:
            drawing.draw_shape(
                canvas,
                t.shape,
                drawing.jitter(rng, drawing.RGB[t.colour]),
                (t.x * width, t.y * height),
                t.radius * min(width, height),
                t.tilt,
            )
        image = drawing.halve(canvas)
        image = finish(rng, image) if worn else image
        return describe(image, [self._region(t) for t in self.things])

    def _region(self, t: Thing) -> Region:
        width, height = self.size
        centre, radius = (t.x * width, t.y * height), t.radius * min(self.size)
        return shape_region(t.shape, t.colour, centre, radius, self.size)


def place_things(
    rng: random.Random,
    kinds: list[tuple[str, str]],
    size: tuple[int, int],
    radii: tuple[float, float] | None = None,
) -> tuple[Thing, ...]:
    """Put (shape, colour) kinds into a picture of this size without overlap.

    The radius shrinks until all fit, so this always ends; `radii` is the range as a fraction of the shorter
    side.
    """
    width, height = size
    short = min(width, height)
    low, high = radii or _default_radii(len(kinds), size)
    while True:
        placed = _try_place(rng, kinds, size, low, high)
        if placed is not None:
            return tuple(sorted(placed, key=lambda t: (t.x, t.y)))
        low, high = max(low * 0.92, min(low, MIN_RADIUS_PIXELS / short)), high * 0.92
        low = min(low, high)


def _default_radii(count: int, size: tuple[int, int]) -> tuple[float, float]:
    """From a share of the picture that `count` things can fill comfortably."""
    short = min(size)
    fair = math.sqrt(0.28 * size[0] * size[1] / (math.pi * max(1, count))) / short
    high = min(0.42, fair)
    return max(min(0.55 * high, high), min(high, MIN_RADIUS_PIXELS / short)), high


def _try_place(
    rng: random.Random, kinds: list[tuple[str, str]], size: tuple[int, int], low: float, high: float
) -> list[Thing] | None:
    width, height = size
    short = min(width, height)
    placed: list[Thing] = []
    for shape, colour in kinds:
        for _ in range(40):
            radius = rng.uniform(low, high)
            r = radius * short
            if 2 * r + 4 > short:
                continue
            x, y = rng.uniform(r + 1, width - r - 1), rng.uniform(r + 1, height - r - 1)
            gap = 3.0
            clear = all(
                math.dist((x, y), (t.x * width, t.y * height)) > r + t.radius * short + gap for t in placed
            )
            if clear:
                tilt = rng.uniform(-MAX_TILT, MAX_TILT)
                placed.append(Thing(shape, colour, x / width, y / height, radius, tilt))
                break
        else:
            return None
    return placed


def random_kinds(
    rng: random.Random, count: int, shapes: list[str] | None = None, colours: list[str] | None = None
) -> list[tuple[str, str]]:
    """`count` different (shape, colour) pairs whose colours share a background."""
    shapes, colours = shapes or list(SHAPES), colours or compatible_colours(rng)
    pairs = [(s, c) for s in shapes for c in colours]
    return rng.sample(pairs, min(count, len(pairs)))


def compatible_colours(rng: random.Random) -> list[str]:
    """The colours that can be seen on one random background."""
    background = rng.choice(drawing.BACKGROUNDS)
    return [c for c in COLOURS if drawing.distance(drawing.RGB[c], background) >= drawing.MIN_CONTRAST]


def random_scene(
    rng: random.Random, count: int, sides: tuple[int, int] = SINGLE, may_be_large: bool = True
) -> Scene:
    """`count` different things in a picture of random size."""
    size = picture_size(rng, sides, may_be_large=may_be_large)
    return Scene(size, place_things(rng, random_kinds(rng, count), size))

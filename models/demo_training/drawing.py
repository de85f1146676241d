"""How the small world looks: shape outlines, colours with a little jitter, backgrounds that contrast.

Everything is drawn at twice its size and halved, so edges are smooth. Which things stand where is decided
in scene.py; noise and compression come after, in finish.py.
"""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

OVERSAMPLING = 2

RGB: dict[str, Colour] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 40),
    "orange": (250, 140, 20),
    "purple": (135, 50, 175),
    "pink": (250, 130, 190),
    "brown": (125, 75, 35),
    "black": (20, 20, 20),
    "white": (248, 248, 248),
}
BACKGROUNDS: tuple[Colour, ...] = (
    (255, 255, 255),
    (240, 240, 236),
    (226, 232, 240),
    (196, 198, 200),
    (128, 130, 132),
    (70, 74, 80),
    (24, 24, 28),
    (246, 236, 214),
    (206, 226, 246),
    (214, 238, 216),
)
MIN_CONTRAST = 95.0  # Euclidean distance in RGB between a thing and what is behind it
JITTER = 12  # per channel


def distance(a: Colour, b: Colour) -> float:
    return math.dist(a, b)


def jitter(rng: random.Random, colour: Colour, amount: int = JITTER) -> Colour:
    red, green, blue = (min(255, max(0, c + rng.randint(-amount, amount))) for c in colour)
    return red, green, blue


def background_for(rng: random.Random, colours: list[str], contrast: float = MIN_CONTRAST) -> Colour:
    """A background on which all these colours can be seen; the palette always has one or two such."""
    usable = [b for b in BACKGROUNDS if all(distance(b, RGB[c]) >= contrast for c in colours)]
    if not usable:  # nearly the whole palette at once: take the one with the most room
        usable = [max(BACKGROUNDS, key=lambda b: min(distance(b, RGB[c]) for c in colours))]
    return rng.choice(usable)


def blank(rng: random.Random, size: tuple[int, int], colour: Colour) -> Image.Image:
    """An oversampled canvas in one colour, now and then with a weak gradient."""
    width, height = size[0] * OVERSAMPLING, size[1] * OVERSAMPLING
    if rng.random() < 0.75:
        return Image.new("RGB", (width, height), colour)
    other = jitter(rng, colour, 20)
    ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((width, height))
    return Image.composite(Image.new("RGB", ramp.size, other), Image.new("RGB", ramp.size, colour), ramp)


def halve(canvas: Image.Image) -> Image.Image:
    return canvas.reduce(OVERSAMPLING)


def _around(count: int, radius: float, start: float) -> list[Point]:
    turn = 2 * math.pi / count
    return [(radius * math.sin(start + i * turn), -radius * math.cos(start + i * turn)) for i in range(count)]


def _star() -> list[Point]:
    outer, inner = _around(5, 1.0, 0.0), _around(5, 0.42, math.pi / 5)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _cross(arm: float = 0.34) -> list[Point]:
    corner = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    points: list[Point] = []
    for _ in range(4):
        points += corner
        corner = [(-y, x) for x, y in corner]
    return points


def _heart(steps: int = 28) -> list[Point]:
    angles = [2 * math.pi * i / steps for i in range(steps)]
    return [
        (
            math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16,
        )
        for a in angles
    ]


# Outlines in a circle of radius 1 around (0, 0), y downwards. Circle and ring are ellipses instead.
OUTLINES: dict[str, list[Point]] = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": _around(3, 1.0, 0.0),
    "diamond": [(0.0, -1.0), (0.66, 0.0), (0.0, 1.0), (-0.66, 0.0)],
    "star": _star(),
    "cross": _cross(),
    "heart": _heart(),
}
RING_WIDTH = 0.42  # of the radius


def draw_shape(
    canvas: Image.Image, shape: str, colour: Colour, centre: Point, radius: float, tilt: float = 0.0
) -> None:
    """Draw one shape on an oversampled canvas.

    centre, radius  in pixels of the final picture
    tilt            in radians; circle and ring do not show it
    """
    draw = ImageDraw.Draw(canvas)
    x, y, r = (value * OVERSAMPLING for value in (*centre, radius))
    if shape in ("circle", "ring"):
        box = (x - r, y - r, x + r, y + r)
        if shape == "circle":
            draw.ellipse(box, fill=colour)
        else:
            draw.ellipse(box, outline=colour, width=max(2, round(r * RING_WIDTH)))
        return
    cos, sin = math.cos(tilt), math.sin(tilt)
    draw.polygon(
        [(x + r * (px * cos - py * sin), y + r * (px * sin + py * cos)) for px, py in OUTLINES[shape]],
        fill=colour,
    )

"""What a drawn picture or frame shows, and where: who draws it leaves regions in its `info`.

labels.py turns them into lessons for patches and tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

KEY = "regions"
_INNER = 0.75  # of the radius: half the side of the box that a thing fills
# The typeface of the server's time stamp (Roboto), in shares of its size.
_STAMP_WIDTHS = {"t": 0.33, "i": 0.24, "m": 0.88, "e": 0.53, ":": 0.24, " ": 0.25, ".": 0.26}
_DIGIT_WIDTH, _STAMP_HEIGHT = 0.56, 1.1
_LEGIBLE = 11  # pixels


@dataclass(frozen=True)
class Region:
    """A shape, a character, or (form None) something that is not told; the box in fractions of both sides.

    order   of a character in its text, from 0
    motion  of a thing in a clip: the step (x, y) it takes, (0, 0) when it stays; None in a picture
    turn    of a thing in a clip: which flash this is, or which of its colours, from 1
    """

    form: str | None
    colour: str | None
    left: float
    top: float
    right: float
    bottom: float
    order: int | None = None
    motion: tuple[int, int] | None = None
    turn: int | None = None


def describe(image: Image.Image, regions: list[Region]) -> Image.Image:
    image.info[KEY] = regions
    return image


def shape_region(
    shape: str,
    colour: str,
    centre: tuple[float, float],
    radius: float,
    size: tuple[int, int],
    motion: tuple[int, int] | None = None,
    turn: int | None = None,
) -> Region:
    """Centre, radius and the picture's size in pixels."""
    (x, y), (width, height), half = centre, size, _INNER * radius
    return Region(shape, colour, (x - half) / width, (y - half) / height, (x + half) / width,
                  (y + half) / height, motion=motion, turn=turn)  # fmt: skip


def stamp_regions(size: tuple[int, int], written: str) -> list[Region]:
    """The time that the server writes into the top left corner of a frame: its seconds' four digits.

    What stands before them is not told, nor are digits of a handful of pixels.
    """
    em = int(0.1 * min(size))
    width, height = em / size[0], _STAMP_HEIGHT * em / size[1]
    edges = np.cumsum([0.0, *(_STAMP_WIDTHS.get(c, _DIGIT_WIDTH) for c in written)]) * width
    if em < _LEGIBLE:
        return [Region(None, None, 0.0, 0.0, float(edges[-1]), height)]
    seconds = [i for i in range(len(written) - 5, len(written)) if written[i] != "."]
    return [Region(None, None, 0.0, 0.0, float(edges[seconds[0]]), height)] + [
        Region(written[i], None, float(edges[i]), 0.0, float(edges[i + 1]), height, order)
        for order, i in enumerate(seconds)
    ]

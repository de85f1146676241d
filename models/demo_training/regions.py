"""What is where in a drawn picture, patch by patch: a lesson for the tower alone, which tutor.py gives.

Who draws a picture leaves regions in its `info`; `patch_labels` turns them into a class per patch, which the
tower's last states must tell through a linear head. That reaches every patch directly, where an answer's loss
has to find its way back through the whole decoder. The head is not part of the exported model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from models.demo_training.names import COLOURS, SHAPES

KEY = "regions"
_FORMS = [*SHAPES, *"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"]
_COLOURS = list(COLOURS)
NUM_FORMS, NUM_COLOURS = len(_FORMS) + 1, len(_COLOURS) + 1  # 0 is the background
UNKNOWN = 255  # of a patch nobody described, and of the colour of letters


@dataclass(frozen=True)
class Region:
    """A shape or a character; the box as fractions of width and height."""

    form: str
    colour: str | None
    left: float
    top: float
    right: float
    bottom: float


def describe(image: Image.Image, regions: list[Region]) -> Image.Image:
    image.info[KEY] = regions
    return image


def patch_labels(image: Image.Image | None, rows: int, columns: int) -> np.ndarray:
    """[rows * columns, 2] uint8, form and colour, in the order of the windows (2 x 2 patches together)."""
    labels = np.full((rows, columns, 2), UNKNOWN, np.uint8)
    if image is not None and KEY in image.info:
        labels[...] = 0
        y, x = (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns
        for region in image.info[KEY]:
            inside_y, inside_x = (
                _covered(y, region.top, region.bottom), _covered(x, region.left, region.right)
            )  # fmt: skip
            colour = UNKNOWN if region.colour is None else 1 + _COLOURS.index(region.colour)
            labels[np.ix_(inside_y, inside_x)] = 1 + _FORMS.index(region.form), colour
    windows = labels.reshape(rows // 2, 2, columns // 2, 2, 2).transpose(0, 2, 1, 3, 4)
    return windows.reshape(-1, 2)


def _covered(centres: np.ndarray, low: float, high: float) -> np.ndarray:
    """Which centres lie between; at least the one nearest to the middle."""
    inside = (centres >= low) & (centres <= high)
    inside[np.abs(centres - (low + high) / 2).argmin()] = True
    return inside

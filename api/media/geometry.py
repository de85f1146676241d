"""How large an image becomes before it is cut into patches: the Paddle rule, facts only, no pixels."""

from __future__ import annotations

import math

from api.media.refusal import MediaRefusal

PATCH = 14  # pixels
MERGE = 2  # patches that become one token, along each side
FACTOR = PATCH * MERGE
MAX_RATIO = 200


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) as multiples of 28, near the given ones and within the pixel bounds.

    Python's round is banker's rounding, as in the reference. Sides beyond 200:1 are clamped first.
    Raises MediaRefusal when no such size lies within the bounds.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        if height > width:
            width = _nearest(width)
            height = math.floor(width * MAX_RATIO / FACTOR) * FACTOR
        else:
            height = _nearest(height)
            width = math.floor(height * MAX_RATIO / FACTOR) * FACTOR
    rows, columns = _nearest(height), _nearest(width)
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = math.floor(height / shrink / FACTOR) * FACTOR
        columns = math.floor(width / shrink / FACTOR) * FACTOR
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / FACTOR) * FACTOR
        columns = math.ceil(width * grow / FACTOR) * FACTOR
    if not min_pixels <= rows * columns <= max_pixels or not rows * columns:
        raise MediaRefusal(
            f"is {width}x{height} pixels, which cannot be resized to between {min_pixels} and {max_pixels} "
            "pixels; change its shape or the pixel bounds"
        )
    return rows, columns


def num_image_tokens(rows: int, columns: int) -> int:
    """Placeholders of an image of `rows` x `columns` patches."""
    return rows * columns // MERGE**2


def num_video_tokens(frames: int, rows: int, columns: int) -> int:
    """Placeholders of a video; `frames` is even, two frames share their tokens."""
    return frames * rows * columns // (2 * MERGE**2)


def _nearest(side: int) -> int:
    return max(FACTOR, round(side / FACTOR) * FACTOR)

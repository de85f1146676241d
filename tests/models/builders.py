"""What the demo model's tests share: samples by number, and measurements of pictures."""

from __future__ import annotations

from collections import Counter

import numpy as np
from PIL import Image

from models.demo_training import drawing
from models.demo_training.sample import Clip, Sample, Space, rng_for
from models.demo_training.skills import SKILLS

MIN_AREA = 20  # pixels; smaller specks are smoothed edges between two things' colours


def draw(skill: str, index: int, space: Space = "training", seed: int = 0) -> Sample:
    return SKILLS[skill](rng_for(space, seed, skill, index))


def question_of(sample: Sample) -> str:
    content = sample.messages[-1]["content"]
    return content if isinstance(content, str) else "".join(p.get("text", "") for p in content)


def pictures_of(sample: Sample) -> list[Image.Image]:
    return [frame for item in sample.media for frame in (item.frames if isinstance(item, Clip) else [item])]


def colour_map(image: Image.Image) -> tuple[np.ndarray, list[str]]:
    """[H, W] index of the nearest palette colour, -1 for background and smoothed edges; the palette's names.

    The background is the colour of the corners' majority, which things never cover all at once.
    """
    pixels = np.asarray(image, np.float32)
    names = list(drawing.RGB)
    palette = np.array([drawing.RGB[name] for name in names], np.float32)
    distance = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    nearest = distance.argmin(-1)
    nearest[distance.min(-1) > 2.2 * drawing.JITTER] = -1
    nearest[np.linalg.norm(pixels - _background(pixels), axis=-1) < 40] = -1
    return nearest, names


def _background(pixels: np.ndarray) -> np.ndarray:
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(border, axis=0)


def count_things(image: Image.Image) -> Counter[str]:
    """Connected spots per palette colour."""
    colours, names = colour_map(image)
    counts: Counter[str] = Counter()
    seen = colours < 0
    for start in zip(*np.nonzero(~seen), strict=True):
        if seen[start]:
            continue
        area = _flood(colours, seen, start)
        if area >= MIN_AREA:
            counts[names[colours[start]]] += 1
    return counts


def _flood(colours: np.ndarray, seen: np.ndarray, start: tuple[int, int]) -> int:
    """Mark the spot around `start` as seen; returns its pixels."""
    stack, area, colour = [start], 0, colours[start]
    seen[start] = True
    while stack:
        y, x = stack.pop()
        area += 1
        for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = 0 <= place[0] < seen.shape[0] and 0 <= place[1] < seen.shape[1]
            if inside and not seen[place] and colours[place] == colour:
                seen[place] = True
                stack.append(place)
    return area


def thing_pixels(image: Image.Image) -> np.ndarray:
    """[n, 2] rows and columns of pixels that clearly differ from the background, noise and light aside."""
    pixels = np.asarray(image, np.float32)
    return np.argwhere(np.linalg.norm(pixels - _background(pixels), axis=-1) > 70)

"""What happens to a picture between a camera and a server: noise, blur, light, JPEG.

Also the sizes of pictures: the ranges live here because they decide how many tokens training costs.
"""

from __future__ import annotations

import io
import math
import random

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

# Sides of a picture in pixels, at most what the preprocessor lets through (config.MAX_IMAGE_PIXELS).
# LARGE pictures are shrunk by it, in training as in serving.
SINGLE = (84, 252)
SEVERAL = (70, 140)
FRAME = (84, 126)
LARGE_FRAME = (180, 300)
LARGE = (300, 640)
LARGE_SHARE = 0.04


def picture_size(
    rng: random.Random, sides: tuple[int, int] = SINGLE, max_aspect: float = 2.5, may_be_large: bool = True
) -> tuple[int, int]:
    """(width, height): area and aspect ratio both log-uniform, most pictures near square."""
    low, high = LARGE if may_be_large and rng.random() < LARGE_SHARE else sides
    side = math.exp(rng.uniform(math.log(low), math.log(high)))
    aspect = math.exp(rng.triangular(-1.0, 1.0, 0.0) * math.log(max_aspect))
    return max(56, round(side * math.sqrt(aspect))), max(56, round(side / math.sqrt(aspect)))


def _with_noise(rng: random.Random, image: Image.Image) -> Image.Image:
    sigma = rng.uniform(2.0, 14.0)
    noise = np.random.default_rng(rng.getrandbits(64)).standard_normal(
        (image.height, image.width), dtype=np.float32
    )
    pixels = np.asarray(image, np.float32) + (noise * sigma)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _as_jpeg(rng: random.Random, image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=rng.randint(35, 92))
    return Image.open(buffer).convert("RGB")


def finish(rng: random.Random, image: Image.Image) -> Image.Image:
    """Wear a picture a little; about a third of all pictures stay as they are."""
    if rng.random() < 0.3:
        return image
    if rng.random() < 0.15:
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.8, 1.15))
    if rng.random() < 0.12:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    if rng.random() < 0.35:
        image = _with_noise(rng, image)
    if rng.random() < 0.5:
        image = _as_jpeg(rng, image)
    return image

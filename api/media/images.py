"""One encoded image to RGB pixels: which formats, how large, which way up, what is behind transparency."""

from __future__ import annotations

import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from api.media.geometry import MAX_RATIO
from api.media.refusal import MediaRefusal

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 100_000_000  # before resizing; decoded it takes up to four bytes each
_MIN_SIDE = 2

# Our own limit is checked on the header, with a sentence of our own.
Image.MAX_IMAGE_PIXELS = None
_WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N")


def read_image(file: BinaryIO) -> Image.Image:
    """Decode to mode RGB, upright. Animated images give their first frame.

    Raises MediaRefusal for anything that is not a usable image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(file, formats=FORMATS)
            check_size(image.width, image.height)
            image.load()
            # Pixels move before colours change: exif_transpose keeps the mode.
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except UnidentifiedImageError:
        raise MediaRefusal(f"is not in a supported format ({', '.join(FORMATS)})") from None
    except MemoryError:
        raise MediaRefusal("needs too much memory to decode") from None
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError):
        # The decoder's own words may show addresses or paths.
        raise MediaRefusal("is damaged or cut short and cannot be decoded") from None


def check_size(width: int, height: int) -> None:
    """Refuse what no model could look at, before any pixel is decoded."""
    if min(width, height) < _MIN_SIDE:
        raise MediaRefusal(f"is {width}x{height} pixels; both sides must have at least {_MIN_SIDE}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise MediaRefusal(f"is {width}x{height} pixels; one side may be at most {MAX_RATIO} times the other")
    if width * height > MAX_PIXELS:
        raise MediaRefusal(
            f"is {width}x{height} pixels, more than the {MAX_PIXELS // 1_000_000} million that are decoded; "
            "send a smaller one"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """16-bit grey is scaled to 8 bits; what is transparent shows white."""
    if image.mode in _WIDE_GREY or image.mode == "I":
        grey = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def resize(image: Image.Image, rows: int, columns: int) -> np.ndarray:
    """[rows, columns, 3] uint8, by Pillow's bicubic filter, as the model was trained.

    What a server does at once in patches.py, resize_to_patches, with the same bits.
    """
    if image.size != (columns, rows):
        image = image.resize((columns, rows), Image.Resampling.BICUBIC)
    return np.asarray(image)

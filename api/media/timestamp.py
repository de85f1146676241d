"""The time that is drawn onto every frame of a video; without it the model loses its sense of when."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from engine.errors import ConfigError

FONT_FILE = "Roboto-Regular.ttf"


def format_timestamp(seconds: float) -> str:
    """`time: HH:MM:SS.ss`; 59.999 gives 60.00 seconds without carry, as in training."""
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    return f"time: {math.floor(hours):02d}:{math.floor(minutes):02d}:{rest:05.02f}"


class TimestampFont:
    """Roboto Regular, from the checkpoint's folder or else from the font package."""

    def __init__(self, model_folder: str | Path = "") -> None:
        """Raises ConfigError when there is no font, since frames without a time mislead the model."""
        own = Path(model_folder) / FONT_FILE
        self.path = own if model_folder and own.is_file() else _packaged_font()
        self._sized = lru_cache(maxsize=64)(self._load)
        try:
            self._sized(16)
        except (OSError, ImportError) as error:
            raise ConfigError(
                f"The font {self.path} for video timestamps cannot be loaded: {error}."
            ) from None

    def draw(self, frame: Image.Image, seconds: float) -> None:
        """Write the time into the top left corner of an RGB frame, black with a white rim."""
        size = max(1, int(0.1 * min(frame.size)))
        ImageDraw.Draw(frame).text(
            (0, 0),
            format_timestamp(seconds),
            font=self._sized(size),
            fill=(0, 0, 0),
            stroke_width=int(0.1 * size),
            stroke_fill=(255, 255, 255),
        )

    def _load(self, size: int) -> ImageFont.FreeTypeFont:
        font = ImageFont.truetype(str(self.path), size)
        if "[" in self.path.name:  # a variable font; its name lists the axes
            font.set_variation_by_name("Regular")
        return font


def _packaged_font() -> Path:
    try:
        import fontpkg_roboto
    except ImportError:
        raise ConfigError(
            f"No font for video timestamps: put {FONT_FILE} into the model folder or install fontpkg-roboto."
        ) from None
    folder = Path(fontpkg_roboto.__file__).parent / "files"
    for path in sorted(folder.glob("Roboto[[]*.ttf")):
        return path
    raise ConfigError(f"fontpkg-roboto has no Roboto font in {folder}; install it again.")

"""Typefaces in which text is rendered: sans, serif, slab, typewriter, handwriting, at several weights.

They come from font packages (extra `demo`), so every machine draws the same glyphs; a missing one is an
error and not a silent change of the exercise.
"""

from __future__ import annotations

import importlib.util
import random
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import ImageFont


class Face(NamedTuple):
    """A file of a font package; `variation` names an instance of a variable font."""

    package: str
    file: str
    variation: str = ""


FACES: tuple[Face, ...] = (
    Face("fontpkg_roboto", "Roboto[wdth,wght].ttf", "Regular"),
    Face("fontpkg_roboto", "Roboto[wdth,wght].ttf", "Bold"),
    Face("fontpkg_roboto", "Roboto-Italic[wdth,wght].ttf", "Medium Italic"),
    Face("fontpkg_nunito", "Nunito[wght].ttf", "SemiBold"),
    Face("fontpkg_nunito", "Nunito[wght].ttf", "Black"),
    Face("fontpkg_roboto_slab", "RobotoSlab[wght].ttf", "Regular"),
    Face("fontpkg_roboto_slab", "RobotoSlab[wght].ttf", "Bold"),
    Face("fontpkg_noto_serif", "NotoSerif[wdth,wght].ttf", "Regular"),
    Face("fontpkg_noto_serif", "NotoSerif[wdth,wght].ttf", "Bold"),
    Face("fontpkg_roboto_mono", "RobotoMono[wght].ttf", "Medium"),
    Face("fontpkg_ibm_plex_mono", "IBMPlexMono-Regular.ttf"),
    Face("fontpkg_ibm_plex_mono", "IBMPlexMono-SemiBold.ttf"),
    Face("fontpkg_kalam", "Kalam-Regular.ttf"),
    Face("fontpkg_kalam", "Kalam-Bold.ttf"),
)


def random_face(rng: random.Random) -> Face:
    return rng.choice(FACES)


@lru_cache(maxsize=1024)
def load(face: Face, size: int) -> ImageFont.FreeTypeFont:
    """The face at a size in pixels. Raises RuntimeError when its package is not installed."""
    font = ImageFont.truetype(str(_folder(face.package) / face.file), size)
    if face.variation:
        font.set_variation_by_name(face.variation)
    return font


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        name = package.replace("_", "-")
        raise RuntimeError(f"The font package {name} is missing; install the extra 'demo' of this project.")
    return Path(spec.origin).parent / "files"

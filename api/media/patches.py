"""Pixels to patches in the order that the vision tower and its resampler expect, and their content hash."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

from api.media.geometry import MERGE, PATCH
from cuda_ops.pictures import resize_patches

PATCH_BYTES = 3 * PATCH * PATCH


def write_patches(pixels: np.ndarray, out: np.ndarray) -> None:
    """Cut one frame into patches, in one strided copy.

    pixels [H, W, 3] uint8, H and W multiples of 28 · out [H/14 * W/14, 588] uint8, contiguous
    The four patches of a 2x2 window are consecutive rows, windows go in raster order; a row is
    (channel, y, x) with x fastest.
    """
    rows, columns = pixels.shape[0] // (PATCH * MERGE), pixels.shape[1] // (PATCH * MERGE)
    windows = pixels.reshape(rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    np.copyto(
        out.reshape(rows, columns, MERGE, MERGE, 3, PATCH, PATCH), windows.transpose(0, 3, 1, 4, 6, 2, 5)
    )


def resize_to_patches(image: Image.Image, rows: int, columns: int, out: np.ndarray) -> None:
    """Resize an RGB image as images.resize does and cut it as write_patches does, several times as fast."""
    pixels = bytearray(image.tobytes("raw", "RGBX"))  # ops take only what may be written to
    shape = image.height, image.width, 4
    resize_patches(np.frombuffer(pixels, np.uint8).reshape(shape), rows, columns, out)


def load_ops() -> None:
    """Load the compiled ops now, and not with the first picture."""
    side, window = PATCH * MERGE, np.empty((MERGE * MERGE, PATCH_BYTES), np.uint8)
    resize_to_patches(Image.new("RGB", (1, 1)), side, side, window)


class ContentHash:
    """sha256 over kind, shape and every patch, so that equal hashes mean equal encoder output.

    The shape is part of it: a 30x100 and a 100x30 image may have the same bytes. Options need not be:
    whatever they change is visible in the shape or in the pixels.
    """

    def __init__(self, kind: str, grid: tuple[int, int, int]) -> None:
        self._hash = hashlib.sha256(f"{kind} {grid[0]}x{grid[1]}x{grid[2]} uint8\n".encode())

    def update(self, patches: np.ndarray) -> None:
        self._hash.update(patches.data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

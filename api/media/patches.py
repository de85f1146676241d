"""Pixels to patches in the order that the vision tower and its resampler expect, and their content hash."""

from __future__ import annotations

import hashlib

import numpy as np

from api.media.geometry import MERGE, PATCH

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

"""The file of uint8 patches that the ranks map: written frame by frame, hashed on the way."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from api.media.geometry import MERGE, PATCH
from api.media.patches import PATCH_BYTES, ContentHash, resize_to_patches


class PatchFile:
    """A new file of `frames` frames; one frame is in memory at a time."""

    def __init__(self, path: str, kind: str, frames: int, height: int, width: int) -> None:
        """height and width in pixels, multiples of 28. Raises OSError when the file exists already."""
        self.grid = (frames, height // PATCH, width // PATCH)
        self._height, self._width = height, width
        self._hash = ContentHash(kind, self.grid)
        self._patches = np.empty((self.grid[1] * self.grid[2], PATCH_BYTES), np.uint8)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)

    def add(self, image: Image.Image) -> None:
        """Append one frame, resized to the file's height and width."""
        resize_to_patches(image, self._height, self._width, self._patches)
        self.repeat()

    def repeat(self) -> None:
        """Append the last frame once more."""
        self._hash.update(self._patches)
        rest = self._patches.data.cast("B")
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]

    def close(self) -> None:
        os.close(self._descriptor)

    @property
    def content_hash(self) -> str:
        return self._hash.hexdigest()

    @property
    def num_merged_cells(self) -> int:
        """2x2 windows of one frame."""
        return self.grid[1] * self.grid[2] // MERGE**2

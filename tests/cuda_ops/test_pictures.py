"""Resizing gives Pillow's bits, whatever the sizes, and puts every pixel into its patch."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from cuda_ops.pictures import resize_patches
from tests.checks import assert_same_bits

# Before, Pillow went across first always; see cpu/pictures.cc on the order.
has_order = pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 13 chose the order")
SIZES = ((2, 3), (28, 28), (29, 28), (77, 200), (200, 77), (333, 90), (61, 500), (517, 389))
NEW_SIZES = ((28, 28), (56, 140), (224, 84), (308, 308))


def cut(pixels: np.ndarray) -> np.ndarray:
    """[H, W, 3] to [H/14 * W/14, 588], by what the order means."""
    rows, columns = pixels.shape[0] // 28, pixels.shape[1] // 28
    windows = pixels.reshape(rows, 2, 14, columns, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.ascontiguousarray(windows).reshape(-1, 588)


def resized(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    four = np.concatenate([pixels, np.full((*pixels.shape[:2], 1), 77, np.uint8)], axis=2)
    out = np.full((rows // 14 * (columns // 14), 588), 99, np.uint8)
    resize_patches(four, rows, columns, out)
    return out


def by_pillow(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return cut(np.asarray(Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BICUBIC)))


@has_order
@pytest.mark.parametrize("new", NEW_SIZES)
@pytest.mark.parametrize("size", SIZES)
def test_noise_and_hard_edges_are_resized_to_pillows_bits(
    rand: Any, size: tuple[int, int], new: tuple[int, int]
):
    noise = rand.numpy.integers(0, 256, (*size, 3)).astype(np.uint8)
    for pixels in (noise, (noise > 127).astype(np.uint8) * 255):  # edges overshoot, so clipping matters
        assert_same_bits(resized(pixels, *new), by_pillow(pixels, *new), f"{size} to {new}")


@has_order
def test_random_sizes_are_resized_to_pillows_bits(rand: Any):
    for _ in range(60):
        height, width = (int(side) for side in rand.numpy.integers(2, 400, 2))
        rows, columns = (28 * int(cells) for cells in rand.numpy.integers(1, 12, 2))
        pixels = rand.numpy.integers(0, 256, (height, width, 3)).astype(np.uint8)
        what = f"{height}x{width} to {rows}x{columns}"
        assert_same_bits(resized(pixels, rows, columns), by_pillow(pixels, rows, columns), what)


def test_picture_of_the_right_size_is_only_cut(rand: Any):
    pixels = rand.numpy.integers(0, 256, (84, 112, 3)).astype(np.uint8)
    assert_same_bits(resized(pixels, 84, 112), cut(pixels))


def test_picture_without_pixels_and_other_sizes_are_refused():
    out = np.zeros((4, 588), np.uint8)
    with pytest.raises(ValueError, match="no pixels"):
        resize_patches(np.zeros((0, 5, 4), np.uint8), 28, 28, out)
    with pytest.raises(ValueError, match="multiple of 28"):
        resize_patches(np.zeros((5, 5, 4), np.uint8), 29, 28, out)
    with pytest.raises(ValueError, match="patches must be"):
        resize_patches(np.zeros((5, 5, 4), np.uint8), 28, 56, out)
    with pytest.raises(ValueError, match="pixels must be"):
        resize_patches(np.zeros((5, 5, 3), np.uint8), 28, 28, out)

"""Pixels made into activations on the device, so that they travel as bytes."""

from __future__ import annotations

from cuda_ops.library import library
from cuda_ops.tensor import Tensor


def normalize_pixels(patches: Tensor, mean: Tensor, std: Tensor, out: Tensor) -> None:
    """Write (patches / 255 - mean) / std into out, in fp32 and rounded once.

    patches [P, 3*patch*patch] uint8 in channel, y, x order · mean, std [3] fp32 · out fp32|bf16 like patches
    """
    library.normalize_pixels(patches, mean, std, out)

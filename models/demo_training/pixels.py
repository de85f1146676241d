"""uint8 patches to the floats that the tower was specified for."""

from __future__ import annotations

import torch

from models.demo_training.config import preprocessor_config

_PER_CHANNEL = 14 * 14


class Normaliser:
    """(u8 / 255 - mean) / std per channel."""

    def __init__(self, device: torch.device) -> None:
        settings = preprocessor_config()
        mean, std = (
            torch.tensor(settings[key], device=device).repeat_interleave(_PER_CHANNEL)
            for key in ("image_mean", "image_std")
        )
        self._scale, self._shift = 1 / (255 * std), mean / std

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        return patches.float() * self._scale - self._shift

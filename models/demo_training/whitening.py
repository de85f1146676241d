"""What the tower's patch embedding starts as, and stays: the patches' principal components, evened out.

Nearly all that differs between patches is their mean colour. A random embedding passes on just that, and the
tower stays blind to edges for long. Evened out, edges and strokes are as loud as colours from the first step.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from models.demo_training.encode import cut_picture
from models.demo_training.sample import rng_for
from models.demo_training.skills import SKILLS

DRAWN = ("shapes", "counts", "digits", "words")
PER_SKILL = 80
NOISE = 0.05  # variance, in normalised pixels, below which a component is not made louder


@lru_cache(maxsize=2)
def drawn_patches() -> np.ndarray:
    """[P, 588] uint8 of pictures that nothing else shows."""
    samples = (SKILLS[s](rng_for("whitening", 0, s, i)) for s in DRAWN for i in range(PER_SKILL))
    pictures = [p for s in samples for p in s.media if isinstance(p, Image.Image)]
    return np.concatenate([cut_picture(p)[0] for p in pictures])


def whitening(pixels: torch.Tensor, width: int) -> torch.Tensor:
    """pixels [P, 588] as the tower gets them -> [width, 588]; outputs have a variance of up to 1.

    The mean stays in: the tower has no bias here, and its norms take care of it.
    """
    second_moments = (pixels.T @ pixels / len(pixels)).double()
    variances, directions = torch.linalg.eigh(second_moments)
    largest = torch.arange(len(variances) - 1, len(variances) - 1 - width, -1)
    scale = (variances[largest] + NOISE).rsqrt()
    return (directions[:, largest] * scale).T.float()

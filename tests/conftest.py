"""Fixtures that every folder's tests share."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest


class Rand:
    """A seeded source of test data; its repr is the seed, so a failure prints how to repeat it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.numpy = np.random.default_rng(seed)
        self.python = random.Random(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return (self.numpy.standard_normal(shape) * scale).astype(np.float32)

    def __repr__(self) -> str:
        return f"Rand(seed={self.seed}; repeat with OCTET_TEST_SEED={self.seed})"


@pytest.fixture
def rand() -> Rand:
    return Rand(int(os.environ.get("OCTET_TEST_SEED") or random.randrange(2**31)))

"""Sampled tokens made the next step's input, on the CPU and by the emulated CUDA body."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest

from cuda_ops import emulated_device
from cuda_ops.feedback import feed_tokens
from tests.conftest import Rand

VISION_FROM = 50


@pytest.fixture(params=["cpu", "emulated"])
def device(request: pytest.FixtureRequest) -> AbstractContextManager[None]:
    return emulated_device() if request.param == "emulated" else nullcontext()


@pytest.mark.parametrize("num_rows", [0, 1, 300])
def test_rows_with_a_source_get_its_token_and_type(
    rand: Rand, device: AbstractContextManager[None], num_rows: int
):
    sampled = rand.numpy.integers(0, 100, 7, np.int32)
    sources = rand.numpy.integers(-1, 7, num_rows, np.int32)
    token_ids, token_types = (rand.numpy.integers(-1, 9, num_rows, np.int32) for _ in range(2))
    expected_ids = np.where(sources < 0, token_ids, sampled[sources])
    expected_types = np.where(sources < 0, token_types, expected_ids >= VISION_FROM)
    with device:
        feed_tokens(sources, sampled, VISION_FROM, token_ids, token_types)
    assert token_ids.tolist() == expected_ids.tolist(), rand
    assert token_types.tolist() == expected_types.tolist(), rand


def test_source_beyond_the_samples_changes_nothing(device: AbstractContextManager[None]):
    token_ids, token_types = np.array([5], np.int32), np.array([-1], np.int32)
    with device:
        feed_tokens(np.array([2], np.int32), np.array([8, 9], np.int32), VISION_FROM, token_ids, token_types)
    assert (token_ids.tolist(), token_types.tolist()) == ([5], [-1])

"""Memory filled with a repeated block, on the CPU and by the emulated CUDA body."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest

from cuda_ops import emulated_device
from cuda_ops.repeat import repeat_block
from tests.checks import assert_same_bits
from tests.conftest import Rand


@pytest.fixture(params=["cpu", "emulated"])
def device(request: pytest.FixtureRequest) -> AbstractContextManager[None]:
    return emulated_device() if request.param == "emulated" else nullcontext()


@pytest.mark.parametrize(("num_rows", "width"), [(0, 8), (1, 4), (7, 64), (30, 20)])
def test_block_repeats_in_both_directions_from_an_offset(
    rand: Rand, device: AbstractContextManager[None], num_rows: int, width: int
):
    block = rand.numpy.integers(0, 256, (5, 13), np.uint8)
    first_row, first_column = (int(rand.numpy.integers(0, 1000)) for _ in range(2))
    out = np.zeros((num_rows, width), np.int8)
    with device:
        repeat_block(block, first_row, first_column, out)
    rows, columns = (first_row + np.arange(num_rows)) % 5, (first_column + np.arange(width)) % 13
    assert_same_bits(out.view(np.uint8), block[rows][:, columns], f"{rand}")


def test_rows_of_larger_elements_are_taken_as_bytes(rand: Rand, device: AbstractContextManager[None]):
    values = rand.normal(3, 5)
    out = np.zeros((3, 5), np.float32)
    with device:
        repeat_block(values.view(np.uint8), 3, 20, out)
    assert_same_bits(out, values)

"""All-reduce between ranks that map each other's memory: each rank is an OS thread with its own launches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from cuda_ops.emulator import emulator
from tests.checks import assert_close, assert_same_bits
from tests.conftest import Rand

from .builders import BFLOAT16, empty, from_bf16, reported, rounded, to_bf16
from .structures import aligned

EPS = 1e-5
LARGE = 280 * 1024  # elements: over the size at which the sums are split between the ranks


class PeerGroup(ctypes.Structure):
    _fields_ = [
        ("regions", ctypes.c_void_p * 8),
        ("rank", ctypes.c_int32),
        ("world_size", ctypes.c_int32),
        ("capacity", ctypes.c_int64),
    ]


class Group:
    """The regions of `world` ranks and a thread for each."""

    def __init__(self, world: int, capacity: int) -> None:
        size = emulator().number("peer_region_bytes", capacity)
        self.regions = [aligned(size, np.uint8) for _ in range(world)]
        for region in self.regions:
            region[:] = 0
        addresses = [region.ctypes.data for region in self.regions] + [None] * (8 - world)
        self.groups = [PeerGroup((ctypes.c_void_p * 8)(*addresses), r, world, capacity) for r in range(world)]
        self.pool = ThreadPoolExecutor(world)

    def run(self, call: Callable[[int, tuple[PeerGroup, list[np.ndarray]]], Any]) -> list[Any]:
        """call(rank, group argument) on every rank at once."""
        waiting = [self.pool.submit(call, r, (group, self.regions)) for r, group in enumerate(self.groups)]
        return [one.result(timeout=60) for one in waiting]

    def all_reduce(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        def one(rank: int, group: Any) -> np.ndarray:
            out = empty(parts[rank].shape, BFLOAT16)
            emulator().call("all_reduce", None, group, parts[rank], out, out.size)
            return out

        return self.run(one)


def summed(parts: list[np.ndarray]) -> np.ndarray:
    total = np.zeros(parts[0].shape, np.float32)
    for part in parts:
        total = total + from_bf16(part)  # ascending ranks, fp32
    return to_bf16(total)


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("size", [8, 4096 * 2 + 24])
def test_every_rank_gets_the_sum_in_rank_order(rand: Rand, world: int, size: int) -> None:
    parts = [to_bf16(rand.normal(size)) for _ in range(world)]
    for out in Group(world, size).all_reduce(parts):
        assert_same_bits(out, summed(parts))


def test_sums_split_between_the_ranks_have_the_same_bits(rand: Rand) -> None:
    parts = [to_bf16(rand.normal(LARGE)) for _ in range(3)]
    for out in Group(3, LARGE).all_reduce(parts):
        assert_same_bits(out, summed(parts))


def test_calls_of_changing_size_follow_each_other(rand: Rand) -> None:
    group = Group(2, LARGE)
    for size in (8, LARGE, 16, 8192, 8, 8):
        parts = [to_bf16(rand.normal(size)) for _ in range(2)]
        for out in group.all_reduce(parts):
            assert_same_bits(out, summed(parts))


def test_a_fast_rank_may_be_a_call_ahead(rand: Rand) -> None:
    calls = [[to_bf16(rand.normal(64)) for _ in range(2)] for _ in range(5)]

    def all_calls(rank: int, group: Any) -> list[np.ndarray]:
        outs = []
        for parts in calls:  # no meeting between the calls but the kernel's own
            outs.append(empty((64,), BFLOAT16))
            emulator().call("all_reduce", None, group, parts[rank], outs[-1], 64)
        return outs

    for outs in Group(2, 64).run(all_calls):
        for out, parts in zip(outs, calls, strict=True):
            assert_same_bits(out, summed(parts))


@pytest.mark.parametrize(("m", "h"), [(1, 2048), (3, 40), (35, 8192)])
def test_residual_and_norm_ride_along(rand: Rand, m: int, h: int) -> None:
    world = 2
    parts = [to_bf16(rand.normal(m, h)) for _ in range(world)]
    before, weight = to_bf16(rand.normal(m, h)), to_bf16(rand.normal(h))

    def one(rank: int, group: Any) -> tuple[np.ndarray, np.ndarray]:
        residual, out = before.copy(), empty((m, h), BFLOAT16)
        emulator().call("all_reduce_add_rms_norm", None, group, parts[rank], residual, weight, EPS, out, m, h)
        return residual, out

    expected_residual = rounded(from_bf16(before) + from_bf16(summed(parts)))
    wide = expected_residual.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + EPS) * from_bf16(weight)
    results = Group(world, m * h).run(one)
    for residual, out in results:
        assert_same_bits(from_bf16(residual), expected_residual)
        assert_close(from_bf16(out), expected, np.abs(expected).max() * 2**-8)
        assert_same_bits(out, results[0][1])


def test_a_message_beyond_the_regions_is_refused(rand: Rand) -> None:
    group = Group(2, 64)
    with reported("the message is larger than the group's regions"):
        group.all_reduce([np.zeros(72, np.uint16)] * 2)

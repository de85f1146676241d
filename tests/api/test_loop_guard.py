"""The guard itself: it must fail a test that blocks, and let one pass that only has much to do."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.api.loop_guard import EventLoopBlocked, run_guarded


def test_a_blocked_loop_fails_and_the_place_is_named() -> None:
    async def block() -> None:
        await asyncio.sleep(0.05)
        time.sleep(0.5)  # noqa: ASYNC251

    with pytest.raises(EventLoopBlocked, match=r"time\.sleep"):
        run_guarded(block)


def test_a_loop_that_stood_still_only_once_passes() -> None:
    runs = []

    async def block_at_first() -> None:
        await asyncio.sleep(0.05)
        runs.append(len(runs))
        if runs == [0]:
            time.sleep(0.5)  # noqa: ASYNC251

    run_guarded(block_at_first)
    assert runs == [0, 1]


def test_a_test_that_fails_while_the_loop_is_blocked_is_not_run_again() -> None:
    runs = []

    async def block_and_fail() -> None:
        await asyncio.sleep(0.05)
        runs.append(len(runs))
        time.sleep(0.5)  # noqa: ASYNC251
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_guarded(block_and_fail)
    assert runs == [0]


def test_much_work_in_small_pieces_passes() -> None:
    async def work() -> None:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0)

    run_guarded(work)

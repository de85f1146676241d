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
        run_guarded(block())


def test_much_work_in_small_pieces_passes() -> None:
    async def work() -> None:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(0)

    run_guarded(work())

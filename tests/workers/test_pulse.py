"""A rank's sign of life while it cannot turn its loop."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import workers.pulse
from engine.status_page import Heart, Phase, StatusPage
from workers.pulse import PatientGroup, Pulse


@pytest.fixture
def page(tmp_path: Path) -> Iterator[StatusPage]:
    page = StatusPage(tmp_path / "status", 1, create=True)
    yield page
    page.close()


@pytest.fixture
def pulse(page: StatusPage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pulse]:
    monkeypatch.setattr(workers.pulse, "INTERVAL", 0.005)
    pulse = Pulse(Heart(page, 0, os.getpid()))
    yield pulse
    pulse.close()


def beats_after(page: StatusPage, moment: float, within: float = 10.0) -> bool:
    """Whether the rank beats later than `moment`."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if page.read(0).beat > moment:
            return True
    return False


def test_loop_beats_with_its_phase_and_step(page: StatusPage, pulse: Pulse):
    pulse.beat(phase=Phase.RUNNING, step=7)
    row = page.read(0)
    assert (row.phase, row.step, row.pid) == (Phase.RUNNING, 7, os.getpid())


def test_thread_beats_while_the_loop_has_promised_to_be_busy(page: StatusPage, pulse: Pulse):
    pulse.beat(allowance=60.0, step=3)
    assert beats_after(page, time.monotonic())
    assert page.read(0).step == 3, "the thread's beats keep what the loop said"


def test_rank_goes_silent_when_its_promise_is_out(page: StatusPage, pulse: Pulse):
    pulse.beat(allowance=0.05)
    time.sleep(0.1)
    assert not beats_after(page, time.monotonic(), within=0.1)


class SlowGroup:
    """A barrier that returns once the waiting rank has been seen to beat."""

    def __init__(self, page: StatusPage) -> None:
        self._page = page

    def barrier(self) -> None:
        assert beats_after(self._page, time.monotonic())


def wait_in_barrier(page: StatusPage, pulse: Pulse) -> None:
    group: Any = SlowGroup(page)
    PatientGroup(group, pulse, timeout=60.0).barrier()


def test_rank_that_waits_in_a_collective_keeps_beating_until_it_is_over(page: StatusPage, pulse: Pulse):
    wait_in_barrier(page, pulse)
    time.sleep(0.02)
    assert not beats_after(page, time.monotonic(), within=0.1)


def test_wait_in_a_collective_keeps_an_earlier_promise(page: StatusPage, pulse: Pulse):
    pulse.beat(allowance=60.0)
    wait_in_barrier(page, pulse)
    assert beats_after(page, time.monotonic())

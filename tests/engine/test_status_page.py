"""What a rank writes on the page is what the engine reads, also in the middle of a write."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from engine.status_page import Heart, Phase, RankStatus, StatusPage

READS = 100_000


def test_a_row_comes_back_as_it_was_written_and_no_other_changes(tmp_path: Path):
    page = StatusPage(tmp_path / "page", 3, create=True)
    status = RankStatus(12.5, 4711, Phase.LOADING, 1 << 40, 1 << 41, -1)
    StatusPage(tmp_path / "page", 3).write(1, status)
    assert page.read(1) == status
    assert page.read(0) == page.read(2) == RankStatus(0.0, 0, Phase.ABSENT, 0, 0, 0)
    page.close()


def test_a_rank_that_never_began_is_not_called_silent(tmp_path: Path):
    page = StatusPage(tmp_path / "page", 2, create=True)
    Heart(page, 1, 4711).beat()
    assert page.silent_ranks(-1.0) == [1]
    assert page.silent_ranks(60.0) == []


def test_a_reader_never_sees_half_a_beat(tmp_path: Path):
    """While another process beats without a pause, every beat read is one that was written."""
    page = StatusPage(tmp_path / "page", 1, create=True)
    began = time.monotonic()
    writer = os.fork()
    if not writer:
        heart = Heart(StatusPage(tmp_path / "page", 1), 0, os.getpid())
        while True:
            heart.beat()
    try:
        while not page.read(0).beat:
            assert time.monotonic() < began + 30, "the writer does not come to write"
        beats = [page.read(0).beat for _ in range(READS)]
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    wrong = [beat for beat in beats if not began <= beat <= time.monotonic()]
    assert not wrong, f"{len(wrong)} of {READS} reads, as in {wrong[0]}"
    assert beats == sorted(beats)
    assert len(set(beats)) > 1, "the writer stood still"

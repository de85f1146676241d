"""What is said while ranks load: how far they are, and which of them does not advance."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.progress import LoadingProgress
from engine.status_page import Heart, Phase, StatusPage


@pytest.fixture
def page(tmp_path: Path) -> Iterator[StatusPage]:
    page = StatusPage(tmp_path / "status", 2, create=True)
    yield page
    page.close()


def loading(page: StatusPage, *gigabytes: float) -> None:
    """Ranks that have loaded so much of 4 GB each."""
    for rank, loaded in enumerate(gigabytes):
        Heart(page, rank, 1).beat(
            phase=Phase.LOADING, bytes_loaded=int(loaded * 1e9), bytes_total=4_000_000_000
        )


def test_rank_that_loads_nothing_is_named_until_it_goes_on(page: StatusPage):
    progress = LoadingProgress(page)
    loading(page, 1.0, 0.5)
    assert "nothing" not in progress.describe(100.0)
    loading(page, 1.5, 0.5)
    assert "nothing" not in progress.describe(108.0)
    loading(page, 2.0, 0.5)
    assert progress.describe(112.0).endswith("; rank 1 has loaded nothing for 12 s (at 0.50 of 4.00 GB)")
    loading(page, 2.5, 0.6)
    assert "nothing" not in progress.describe(113.0)


def test_rank_that_has_everything_is_not_stalled(page: StatusPage):
    progress = LoadingProgress(page)
    loading(page, 4.0, 1.0)
    progress.describe(100.0)
    loading(page, 4.0, 2.0)
    assert "nothing" not in progress.describe(200.0)


def test_plain_lines_tell_every_rank(page: StatusPage, caplog: pytest.LogCaptureFixture):
    progress = LoadingProgress(page)
    with caplog.at_level(logging.INFO):
        for now, part in ((100.0, 1.0), (106.0, 2.0)):
            loading(page, part, part / 2)
            progress.show(now)
    assert caplog.messages == ["weights 3.00 of 8.00 GB (rank 0 50 %, rank 1 25 %)"]

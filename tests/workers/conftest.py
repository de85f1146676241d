"""Fixtures of the workers' tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def media_folder(tmp_path: Path) -> Path:
    """Where a server keeps the patches of media."""
    folder = tmp_path / "media"
    folder.mkdir()
    return folder

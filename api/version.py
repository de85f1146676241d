"""Which Octet this is, as pyproject.toml says: the program runs from its checkout and is never installed."""

from __future__ import annotations

import re
from pathlib import Path


def _read_version() -> str:
    file = Path(__file__).resolve().parent.parent / "pyproject.toml"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    stated = re.search(r'^version = "([^"]+)"', text, re.M)
    return stated.group(1) if stated else "unknown"


VERSION = _read_version()

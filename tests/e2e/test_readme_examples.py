"""The examples of the README and of api/forms.md as they are; only the address becomes the test server's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.media import jpeg_bytes, mp4_bytes
from tests.e2e.server import ROOT, Server

pytestmark = pytest.mark.e2e

PAGES = ("README.md", "api/forms.md")


def examples_of(page: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


EXAMPLES = [example for page in PAGES for example in examples_of(page)]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_examples_for_curl_and_python(page: str) -> None:
    assert {language for language, _ in examples_of(page)} == {"bash", "python"}


@pytest.mark.parametrize(("language", "code"), EXAMPLES)
def test_example_runs_as_pasted(guide_server: Server, tmp_path: Path, language: str, code: str) -> None:
    (tmp_path / "photo.jpg").write_bytes(jpeg_bytes())
    (tmp_path / "other.jpg").write_bytes(jpeg_bytes(seed=2))
    (tmp_path / "clip.mp4").write_bytes(mp4_bytes())
    code = code.replace("http://localhost:8000", guide_server.address)
    command = ["bash", "-ec", code] if language == "bash" else [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "tokens" in ran.stdout, ran.stdout

"""Takes the screenshots of the chat page that are kept in tests/e2e/screens: light, dark, phone.

    python -m tests.e2e.take_screens [--address http://localhost:8000]

Without an address it starts the server as `./run.sh` does, so the answers are those of the model that comes
with Octet. The pictures are for people to look at; no test compares with them.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from selenium.webdriver.remote.webdriver import WebDriver

from tests.e2e.browser import Page, running_browser
from tests.e2e.server import running_server

FOLDER = Path(__file__).resolve().parent / "screens"
SETTINGS = {"temperature": 0, "max_tokens": 60}


def take_all(browser: WebDriver, address: str) -> None:
    page = Page(browser, address)  # type: ignore[arg-type]
    page.open(**SETTINGS)
    page.emulate(1280, 860)
    save(page, "light")
    ask_two_questions(page, 1280, 860, dark=True)
    save(page, "dark")
    ask_two_questions(page, 390, 844, scale=2.0)
    save(page, "phone")


def ask_two_questions(page: Page, width: int, height: int, *, dark: bool = False, scale: float = 1.0) -> None:
    """A sample by a click, then one more question with thinking."""
    page.open(**SETTINGS)
    page.emulate(width, height, dark=dark, scale=scale)
    page.click(".samples li:nth-child(2) .card")
    page.until_answered()
    page.click("#think")
    page.ask("How many shapes are there?")
    page.until_answered()


def save(page: Page, name: str) -> None:
    drawn = page.browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    image = Image.open(io.BytesIO(base64.b64decode(drawn))).convert("RGB")
    FOLDER.mkdir(exist_ok=True)
    image.save(FOLDER / f"{name}.png", optimize=True)


@contextlib.contextmanager
def server_at(address: str, folder: Path) -> Iterator[str]:
    if address:
        yield address
        return
    with running_server(folder, model="") as server:
        yield server.address


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the screenshots of the chat page.")
    parser.add_argument("--address", default="", help="of a running server; default: start one")
    address = parser.parse_args().address
    with (
        tempfile.TemporaryDirectory() as folder,
        server_at(address.rstrip("/"), Path(folder)) as address,
        running_browser(Path(folder) / "profile") as browser,
    ):
        take_all(browser, address)


if __name__ == "__main__":
    main()

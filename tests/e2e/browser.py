"""A headless Chromium for the page's tests: started, watched for violations of its policy, ended.

Debian's chromium and chromium-driver with selenium; where one of them is missing the tests skip and say so.
`Page` is what a person can do on the page and see there.
"""

from __future__ import annotations

import base64
import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.e2e.media import jpeg_bytes
from tests.e2e.server import await_true

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
PATIENCE = 20.0  # seconds until what a test waits for must have happened

# Requests that fail on purpose are no mistake of the page; everything else in its log is.
_EXPECTED = re.compile(r"Failed to load resource|net::ERR_INTERNET_DISCONNECTED")

_DROP = """
const transfer = new DataTransfer();
for (const [name, type, base64] of arguments[1]) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  transfer.items.add(new File([bytes], name, { type }));
}
const how = arguments[0];
if (how === "paste") {
  const event = new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true });
  document.activeElement.dispatchEvent(event);
} else {
  for (const kind of ["dragenter", "dragover", how]) {
    const event = new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true });
    document.body.dispatchEvent(event);
  }
}
"""


def picture(seed: int = 0) -> tuple[str, str, str]:
    """A photo as Page.bring takes it."""
    return f"photo-{seed}.jpg", "image/jpeg", base64.b64encode(jpeg_bytes(seed=seed)).decode()


@contextlib.contextmanager
def running_browser(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser with an empty profile; skips the test where there is none."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, Service(driver))
    try:
        browser.set_page_load_timeout(PATIENCE)
        browser.set_script_timeout(PATIENCE)
        yield browser
    finally:
        browser.quit()


@contextlib.contextmanager
def watched(browser: webdriver.Chrome, address: str) -> Iterator[Page]:
    """The page of the server at `address`; at the end it must have kept its policy and thrown nothing."""
    page = Page(browser, address)
    page.complaints()
    yield page
    assert page.complaints() == []


class Page:
    """The chat page in a browser."""

    def __init__(self, browser: webdriver.Chrome, address: str) -> None:
        self.browser, self.address = browser, address

    def open(self, **settings: Any) -> None:
        """Load the page with these stored settings and nothing else remembered, and wait until it knows
        the server.
        """
        self.emulate()
        self.be_online(True)
        self.browser.get(self.address + "/live")  # the same origin, nothing to load
        self.script("localStorage.clear(); sessionStorage.clear()")
        self.script("localStorage.setItem('octet.settings', JSON.stringify(arguments[0]))", settings)
        self.load()

    def load(self) -> None:
        self.browser.get(self.address)
        self.wait(lambda: self.state in ("ready", "starting"), "the page has asked the server")
        self.wait(lambda: self.all(".card"), "the samples are there")

    def emulate(
        self, width: int = 1280, height: int = 900, *, dark: bool = False, scale: float = 1.0
    ) -> None:
        """A window of this size in CSS pixels; narrow ones are phones."""
        mobile = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": mobile})
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def be_online(self, online: bool) -> None:
        self.browser.execute_cdp_cmd("Network.enable", {})
        conditions = {"offline": not online, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.browser.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)

    # looking

    def one(self, selector: str) -> WebElement:
        """The last element that matches: of several turns, the newest."""
        return self.all(selector)[-1]

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """All text of the last match, shown or folded."""
        return str(
            self.script("return [...document.querySelectorAll(arguments[0])].at(-1).textContent", selector)
        )

    def shows(self, selector: str) -> bool:
        return any(element.is_displayed() for element in self.all(selector))

    @property
    def state(self) -> str:
        return self.one("#state").get_attribute("data-state") or ""

    @property
    def answer(self) -> str:
        return self.text(".prose")

    @property
    def is_busy(self) -> bool:
        return self.one(".answer").get_attribute("aria-busy") == "true"

    @property
    def numbers(self) -> str:
        return self.one(".numbers").text

    @property
    def focused(self) -> str:
        """Id of what has the keyboard focus, else its class, else its tag."""
        found = "const e = document.activeElement; return e.id || e.className || e.tagName"
        return str(self.script(found))

    def script(self, code: str, *arguments: Any) -> Any:
        return self.browser.execute_script(code, *arguments)

    def wait(self, condition: Any, what: str) -> None:
        await_true(condition, PATIENCE, f"{what} (the page says: {self.text('#turns')[-300:]!r})")

    # doing

    def click(self, selector: str) -> None:
        self.one(selector).click()

    def press(self, *keys: str) -> None:
        """Type into whatever has the focus."""
        self.browser.switch_to.active_element.send_keys(*keys)

    def bring(self, how: str, *files: tuple[str, str, str]) -> None:
        """ "drop" or "paste" files, each (name, type, base64)."""
        self.script(_DROP, how, list(files))

    def ask(self, text: str) -> None:
        self.one("#message").send_keys(text, Keys.ENTER)

    def until_answered(self) -> None:
        self.wait(lambda: self.all(".answer") and not self.is_busy, "the answer has ended")

    def complaints(self) -> list[str]:
        """What the browser logged against the page since last asked: violations of its policy, exceptions."""
        log = self.browser.get_log("browser")
        return [str(entry["message"]) for entry in log if not _EXPECTED.search(entry["message"])]

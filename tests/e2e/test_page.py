"""The chat page in a real browser, against a whole server: from a click to the engine and back.

What needs an exact answer or a server in trouble is in test_page_scripted.py.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="no selenium: install the extra `test`")

from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from api.routes.page import FOLDER
from models.tiny import write_tiny_checkpoint
from tests.e2e.browser import Page, picture, running_browser, watched
from tests.e2e.server import Server, running_server

pytestmark = pytest.mark.e2e

GREEDY = {"temperature": 0, "max_tokens": 24}
LONG = {"temperature": 1, "seed": 5}  # thousands of tokens to what is asked with it: seconds
SAMPLES = json.loads((FOLDER / "samples" / "samples.json").read_text())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tiny random model: it talks on until it is stopped, or by chance draws its last token."""
    folder = tmp_path_factory.mktemp("page")
    write_tiny_checkpoint(folder / "tiny")
    with running_server(folder, "--model", str(folder / "tiny"), "--max-model-len", "8192") as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with running_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser: webdriver.Chrome, server: Server) -> Iterator[Page]:
    with watched(browser, server.address) as page:
        yield page


def test_a_sample_is_asked_and_answered_by_one_click(page: Page) -> None:
    page.open(**GREEDY)
    assert page.text("#model") == "tiny" and "8K context" in page.text("#facts")
    assert "unquantised" in page.text("#facts")
    assert [card.text for card in page.all(".card")] == [sample["question"] for sample in SAMPLES]
    page.click(".samples li:first-child .card")
    page.until_answered()
    assert page.text(".question .words") == SAMPLES[0]["question"]
    assert re.search(r"first token [\d.]+ s", page.numbers)
    assert re.search(r"[\d.]+ tokens/s", page.numbers)
    assert re.search(r"\d+ prompt tokens \((\d+) image", page.numbers)
    assert re.search(r"(24|\d) answer tokens", page.numbers)
    answer = page.script("return document.querySelector('.prose').textContent")
    assert page.text("#announcer").strip() == answer.strip()


def test_pictures_come_by_drop_and_paste_and_leave_by_a_click(page: Page) -> None:
    page.open(**GREEDY)
    page.bring("drop", picture(0), picture(1))
    page.wait(lambda: len(page.all("#tray li")) == 2, "two thumbnails")
    assert not page.shows("#dropzone")
    page.bring("paste", picture(2))
    page.wait(lambda: len(page.all("#tray li")) == 3, "a third thumbnail")
    page.bring("drop", ("notes.txt", "text/plain", "bm90ZXM="))
    page.wait(lambda: page.shows("#notice"), "what is wrong with the text file")
    assert page.text("#notice") == "notes.txt is neither a picture nor a clip."
    page.click("#tray li:nth-child(2) .remove")
    assert [item.get_attribute("title") for item in page.all("#tray li")] == ["photo-0.jpg", "photo-2.jpg"]
    page.ask("What differs?")
    page.until_answered()
    assert not page.shows("#tray") and len(page.all(".question img")) == 2
    two_pictures = int(re.search(r"\((\d+) image", page.numbers)[1])  # type: ignore[index]

    page.ask("And now?")
    page.until_answered()
    again = re.search(r"(\d+) prompt tokens \((\d+) image", page.numbers)
    assert again is not None and int(again[2]) == two_pictures, "the second question keeps the pictures"


def test_a_picked_clip_is_asked_about(page: Page) -> None:
    page.open(**GREEDY)
    page.one("#files").send_keys(str(next((FOLDER / "samples").glob("*.mp4"))))
    page.wait(lambda: page.all("#tray video"), "the clip's thumbnail")
    page.ask("What moves?")
    page.until_answered()
    assert re.search(r"\(\d+ video", page.numbers), page.numbers
    page.click(".clip")
    page.wait(lambda: page.script("return document.querySelector('.clip video').currentTime > 0"), "it plays")


def test_an_answer_streams_until_escape_stops_it_in_the_engine_too(page: Page, server: Server) -> None:
    page.open(**LONG)
    page.ask("Go on for ever.")
    page.wait(lambda: len(page.answer) > 20, "the beginning of an answer")
    assert page.is_busy, "the answer shows while it comes in"
    page.press(Keys.ESCAPE)
    page.until_answered()
    assert page.numbers.endswith("stopped") and "answer tokens" in page.numbers
    assert page.shows("#send") and not page.shows("#stop")
    page.wait(lambda: server.metric("octet:num_requests_running") == 0, "the engine has dropped the request")
    assert 'octet:requests_total{finish_reason="abort"} 1.0' in server.get("/metrics", server.metrics_port)[1]


def test_the_stop_button_takes_the_place_of_send(page: Page) -> None:
    page.open(**LONG)
    page.one("#message").send_keys("Go on.")
    page.click("#send")
    page.wait(lambda: page.shows("#stop") and page.answer, "a running answer")
    assert not page.shows("#send") and page.focused == "stop"
    page.click("#stop")
    page.until_answered()
    assert page.focused == "message"


def test_thinking_is_folded_while_it_runs(page: Page) -> None:
    page.open(**LONG)
    page.click("#think")
    page.ask("Why?")
    page.wait(lambda: page.shows(".thinking.running"), "the running thoughts")
    assert page.text(".thinking .label") == "Thinking"
    assert page.one(".thinking").get_attribute("open") is None
    page.press(Keys.ESCAPE)
    page.until_answered()
    assert page.text(".thinking .label").startswith("Thought for ")
    page.click(".thinking summary")
    assert len(page.one(".thoughts").text) > 0


def test_a_broken_picture_is_explained_and_the_talk_goes_on(page: Page) -> None:
    page.open(**GREEDY)
    page.bring("drop", ("broken.png", "image/png", "AAAA"))
    page.wait(
        lambda: page.text("#tray .tile") == "broken.png" if page.all("#tray .tile") else False, "a tile"
    )
    page.ask("What is this?")
    page.wait(lambda: page.shows(".failure"), "the error")
    sentence = page.text(".failure .sentence")
    assert "image" in sentence and sentence.endswith(".") and "{" not in sentence
    page.ask("Hello")
    page.until_answered()
    assert len(page.all(".turn")) == 2 and "image" not in page.numbers


def test_a_lost_connection_is_explained_and_asked_again(page: Page) -> None:
    page.open(**GREEDY)
    page.be_online(False)
    page.ask("Hello")
    page.wait(lambda: page.shows(".failure"), "the error")
    assert "does not answer" in page.text(".failure .sentence")
    page.wait(lambda: page.state == "unreachable", "the header says so")
    page.be_online(True)
    page.click(".retry")
    page.until_answered()
    page.wait(lambda: page.answer and not page.shows(".failure"), "an answer")
    page.wait(lambda: page.state == "ready", "the header knows again")


def test_code_of_a_request_runs_as_copied(page: Page, tmp_path: Path) -> None:
    page.open(**GREEDY, seed=5)
    name, mime, data = picture()
    page.bring("drop", (f"it's {name}", mime, data))
    page.wait(lambda: page.shows("#tray li"), "the thumbnail")
    page.ask('A "quoted" $HOME `date` \\n question\u2028 你好')
    page.until_answered()
    (tmp_path / f"it's {name}").write_bytes(base64.b64decode(data))
    page.click(".as-code")
    assert "it's photo-0.jpg" in page.text("#code-note")
    written = [answer_of_curl(run_code(["bash", "-c", page.text("#code")], tmp_path))]
    page.click("#code-python")
    assert len(page.text("#code")) < 2000
    written.append(run_code([sys.executable, "-c", page.text("#code")], tmp_path).removesuffix("\n"))
    assert [text.split() for text in written] == [page.answer.split()] * 2
    page.press(Keys.ESCAPE)
    page.wait(lambda: not page.shows("#code-dialog"), "the dialog is closed")


def run_code(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    ran = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def answer_of_curl(events: str) -> str:
    chunks = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    return "".join([c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]])

"""The chat page in a real browser, against an api whose engine is scripted: exact answers, and trouble."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

pytest.importorskip("selenium", reason="no selenium: install the extra `test`")

from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from api.errors import EngineUnavailable
from api.routes.page import FOLDER
from engine.messages import AddRequest, RequestOutput
from tests.api.builders import make_tokenizer
from tests.api.fakes import Script, say
from tests.e2e.browser import Page, picture, running_browser, watched
from tests.e2e.scripted import ScriptedApi, scripted_api

pytestmark = pytest.mark.e2e

HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>'


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedApi]:
    with scripted_api(say("ok")) as api:
        yield api


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with running_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser: webdriver.Chrome, scripted: ScriptedApi) -> Iterator[Page]:
    scripted.say(say("ok"))
    with watched(browser, scripted.address) as page:
        yield page


def think(thoughts: str, content: str) -> Script:
    """A script that closes its thoughts with the marker."""
    end = make_tokenizer().markers["</think>"]

    def script(request: AddRequest) -> Iterator[RequestOutput]:
        for token_ids in (list(thoughts.encode()), [end], list(content.encode())):
            finish = "stop" if token_ids == list(content.encode()) else None
            yield RequestOutput(request.request_id, token_ids, finish_reason=finish)

    return script


def test_reasoning_and_answer_are_told_apart(page: Page, scripted: ScriptedApi) -> None:
    scripted.say(think("Blue, so sky.", "The sky."))
    page.open(enable_thinking=True)
    assert page.one("#think").get_attribute("aria-pressed") == "true"
    page.ask("What is blue?")
    page.until_answered()
    assert (page.text(".thoughts"), page.answer) == ("Blue, so sky.", "The sky.")
    assert "thinking)" in page.numbers
    page.ask("Sure?")
    page.until_answered()
    sent = bytes(t for t in scripted.api.engine.added[-1].prompt_token_ids if t < 256).decode()
    assert "The sky." in sent and "so sky" not in sent, "thoughts are not part of the conversation"


def test_text_is_drawn_as_blocks_and_markup_in_it_stays_text(page: Page, scripted: ScriptedApi) -> None:
    answer = f"One **bold** `code`\nline.\n\n```python\nx = '<b>'\n\ny = 1\n```\n\n{HOSTILE} 你好"
    scripted.say(say(*[answer[i : i + 3] for i in range(0, len(answer), 3)]))
    page.open()
    page.ask(HOSTILE)
    page.until_answered()
    blocks = page.script(
        "return [...document.querySelector('.prose').children].map(b => [b.tagName, b.textContent])"
    )
    assert blocks == [["P", "One bold code\nline."], ["PRE", "x = '<b>'\n\ny = 1"], ["P", f"{HOSTILE} 你好"]]
    assert page.text(".prose strong") == "bold" and page.text(".prose p code") == "code"
    assert page.text(".question .words") == HOSTILE
    assert page.browser.title == "Octet" and not page.all(".turn img, .turn script")


def test_events_survive_every_split_of_their_bytes(page: Page) -> None:
    page.open()
    found, whole = page.browser.execute_async_script(
        """
        const done = arguments[0];
        import("/static/sse.js").then(({ EventParser }) => {
          const text = "\\uFEFFdata: a\\u00e9\\u4f60\\r\\ndata: \\ud83d\\ude00\\r\\n\\r\\n: waiting\\n\\n"
            + "data:b\\ndata:  c\\n\\nevent: x\\nid: 7\\n\\ndata\\rdata: \\r\\rdata: lost without its end\\n";
          const bytes = new TextEncoder().encode(text);
          const parse = (cuts) => {
            const parser = new EventParser();
            return cuts.flatMap((cut, i) => parser.push(bytes.slice(cut, cuts[i + 1] ?? bytes.length)));
          };
          const wrong = [];
          const expected = JSON.stringify(parse([0]));
          for (let i = 0; i <= bytes.length; i++) {
            for (let j = i; j <= bytes.length; j++) {
              if (JSON.stringify(parse([0, i, j])) !== expected) wrong.push([i, j]);
            }
          }
          const single = JSON.stringify(parse([...bytes.keys()]));
          if (single !== expected) wrong.push("byte by byte");
          done([wrong, JSON.parse(expected)]);
        });
        """
    )
    assert whole == ["aé你\n😀", "b\n c", "\n"]
    assert found == []


def test_a_full_server_says_when_to_come_back(page: Page, scripted: ScriptedApi) -> None:
    page.open()
    scripted.api.services.admission.limit = 0
    try:
        page.ask("Hello")
        page.wait(lambda: page.shows(".failure"), "the error")
        assert page.text(".failure .sentence") == (
            "The server is busy: all its places are taken. Try again in 1 s."
        )
    finally:
        scripted.api.services.admission.limit = 10
    page.click(".retry")
    page.until_answered()
    page.wait(lambda: page.answer == "ok", "an answer")
    assert len(page.all(".turn")) == 1 and not page.shows(".failure")


def test_a_loading_server_says_what_it_does(page: Page, scripted: ScriptedApi) -> None:
    scripted.run(scripted.api.engine.set_state("starting", "loading weights"))
    try:
        page.open()
        page.wait(lambda: page.text("#model") == "Starting: loading weights", "the header says so")
        page.ask("Hello")
        page.wait(lambda: page.shows(".failure"), "the error")
        assert "Try again in" in page.text(".failure .sentence")
    finally:
        scripted.run(scripted.api.engine.set_state("ready"))
    page.wait(lambda: page.state == "ready", "the header notices without a reload")


def test_an_answer_that_breaks_off_keeps_what_came(page: Page, scripted: ScriptedApi) -> None:
    scripted.say(say("half an ", finish_reason=None))
    page.open()
    page.ask("Hello")
    page.wait(lambda: page.answer, "the first half")
    scripted.fail_all(EngineUnavailable("The server is shutting down."))
    page.wait(lambda: page.shows(".failure"), "the error")
    assert page.text(".failure .sentence") == "The server is shutting down."
    assert page.answer == "half an "
    scripted.say(say("whole"))
    page.click(".retry")
    page.wait(lambda: page.answer == "whole" and not page.is_busy, "the whole answer")


def test_a_key_is_asked_for_and_forgotten_with_the_tab(browser: webdriver.Chrome) -> None:
    with (
        scripted_api(say("ok"), api_keys=("secret",)) as scripted,
        watched(browser, scripted.address) as page,
    ):
        page.open()
        page.wait(lambda: page.shows("#key-dialog"), "the question for a key")
        page.press("wrong", Keys.ENTER)
        page.wait(lambda: "does not know this key" in page.text("#key-hint"), "that it is wrong")
        page.press(Keys.ESCAPE)
        page.wait(lambda: not page.shows("#key-dialog"), "the dialog is gone")
        page.ask("Hello")
        page.wait(lambda: page.shows("#key-dialog"), "the question for a key again")
        assert "API key" in page.text(".failure .sentence")
        page.press("secret", Keys.ENTER)
        page.wait(lambda: page.answer == "ok", "the answer to the question that was kept")
        assert page.script("return JSON.stringify(localStorage)").find("secret") == -1
        page.click(".as-code")
        assert "$OCTET_API_KEY" in page.text("#code") and "secret" not in page.text("#code")
        page.load()
        page.wait(lambda: page.text("#facts") != "", "the key is still known")


# for everybody ---------------------------------------------------------------------------------------


def test_everything_works_without_a_mouse(page: Page) -> None:
    page.open()
    page.script("document.activeElement.blur()")
    order = []
    for _ in range(20):
        page.press(Keys.TAB)
        assert_focus_is_visible(page)
        order.append(page.focused)
        if page.focused == "think":
            break
    cards = ["card"] * len(json.loads((FOLDER / "samples" / "samples.json").read_text()))
    assert order == ["skip", "open-settings", *cards, "message", "attach", "think"]
    page.press(Keys.SPACE)
    assert page.one("#think").get_attribute("aria-pressed") == "true"
    page.one("#message").send_keys("one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two", Keys.ENTER)
    page.until_answered()
    assert page.text(".question .words") == "one\ntwo"
    assert page.focused == "message"


def assert_focus_is_visible(page: Page) -> None:
    drawn = page.script(
        "const visible = (e) => e && getComputedStyle(e).outlineStyle !== 'none';"
        "const e = document.activeElement; return visible(e) || visible(e.closest('.composer'))"
    )
    assert drawn, f"no focus to be seen on {page.focused}"


def test_a_narrow_phone_never_scrolls_sideways(page: Page, scripted: ScriptedApi) -> None:
    scripted.say(say("x" * 400, "\n\n```\n" + "y" * 400 + "\n```\n\n", "| a | b |" * 30))
    page.open()
    page.emulate(320, 568)
    assert_fits(page)
    page.bring("drop", picture(0), picture(1), picture(2), picture(3), picture(4))
    page.wait(lambda: len(page.all("#tray li")) == 5, "the thumbnails")
    assert_fits(page)
    page.ask("long" * 80)
    page.until_answered()
    assert_fits(page)
    for opener, closer in (("#open-settings", "#close-settings"), (".as-code", "#close-code")):
        page.click(opener)
        assert_fits(page)
        page.click(closer)


def assert_fits(page: Page) -> None:
    """Nothing is wider than the window, but what scrolls on its own: code."""
    wide = page.script(
        """
        const width = document.documentElement.clientWidth, wide = [];
        for (const e of document.querySelectorAll("body, body *")) {
          const box = e.getBoundingClientRect();
          if (e.closest("pre, .unseen, .skip, svg") && e.tagName !== "PRE") continue;
          const sticksOut = box.width && (box.right > width + 0.5 || box.left < -0.5);
          if (sticksOut) wide.push(`${e.tagName}.${e.className}`);
        }
        for (const e of document.querySelectorAll("html, header, main, footer, textarea, dialog[open]")) {
          if (e.scrollWidth > e.clientWidth) wide.push(`inside ${e.tagName}`);
        }
        return [width, wide];
        """
    )
    assert wide == [320, []]


def test_dark_and_light_are_readable(page: Page) -> None:
    page.open()
    page.ask("Hello")
    page.until_answered()
    grounds = set()
    for dark in (False, True):
        page.emulate(dark=dark)
        for selector in (".prose p", ".question .words", ".numbers", "#facts", ".as-code", "#think"):
            contrast = page.script(CONTRAST, selector)
            assert contrast >= 4.5, f"{selector} has {contrast:.2f}:1 when {dark=}"
        grounds.add(page.script("return getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


# WCAG's contrast between the text of an element and the first opaque ground behind it.
CONTRAST = """
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const luminance = (colour) => {
  const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = channels(colour).slice(0, 3).map((c) => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const element = document.querySelector(arguments[0]);
let behind = element;
while (channels(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
const pair = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(luminance);
return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
"""


def test_settings_are_kept_and_bad_ones_refused(page: Page, scripted: ScriptedApi) -> None:
    page.open()
    page.click("#open-settings")
    page.one("#temperature").send_keys("0.3", Keys.TAB)
    page.one("#seed").send_keys("7", Keys.TAB)
    page.one("#top_p").send_keys("5", Keys.ENTER)
    assert page.shows("#settings"), "a dialog with a wrong value stays open"
    page.one("#top_p").clear()
    page.one("#top_p").send_keys("0.9", Keys.ENTER)
    page.wait(lambda: not page.shows("#settings"), "the dialog is closed")
    page.load()
    page.ask("Hello")
    page.until_answered()
    sampling = scripted.api.engine.added[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.3, 0.9, 7)


def test_a_new_chat_starts_over(page: Page, scripted: ScriptedApi) -> None:
    page.open()
    page.ask("First words")
    page.until_answered()
    page.click("#new-chat")
    assert page.shows("#welcome") and not page.all(".turn")
    page.ask("Other words")
    page.until_answered()
    sent = bytes(t for t in scripted.api.engine.added[-1].prompt_token_ids if t < 256).decode()
    assert "Other words" in sent and "First" not in sent


def test_a_broken_policy_would_be_noticed(browser: webdriver.Chrome, scripted: ScriptedApi) -> None:
    """What the other tests rely on: the browser enforces the policy, and its log says so."""
    page = Page(browser, scripted.address)
    page.open()
    assert page.complaints() == []
    page.script("document.body.setAttribute('style', 'color: red')")
    page.script("fetch('http://other.invalid/').catch(() => {})")
    refused = page.script("try { document.body.innerHTML = 'x'; return false } catch { return true }")
    assert refused
    complaints = "\n".join(page.complaints())
    assert "style-src" in complaints and "connect-src" in complaints and "TrustedHTML" in complaints

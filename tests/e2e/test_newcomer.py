"""What a newcomer does: `./run.sh` without a flag, a click on a card of the page, and the right answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.routes.page import FOLDER
from models.page_samples import PageSample, agrees, ask
from tests.e2e.server import Server, running_server

pytestmark = pytest.mark.e2e

FILES = FOLDER / "samples"
CARDS = [
    PageSample(
        card["question"], card["answer"], {name: (FILES / name).read_bytes() for name in card["files"]}
    )
    for card in json.loads((FILES / "samples.json").read_text())
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("newcomer"), model="") as server:
        yield server


def test_the_trained_model_is_served(server: Server) -> None:
    assert [model.id for model in server.client().models.list()] == ["octet-demo"]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.question)
def test_every_card_of_the_page_gets_the_right_answer(server: Server, card: PageSample) -> None:
    answer = ask(server.address, card)
    assert agrees(answer, card.answer), f"{answer!r}, expected {card.answer!r}"


def test_a_click_on_the_first_card_shows_the_right_answer(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("selenium", reason="no selenium: install the extra `test`")
    from tests.e2e.browser import running_browser, watched

    with running_browser(tmp_path / "profile") as browser, watched(browser, server.address) as page:
        page.open()
        assert page.text("#model") == "octet-demo"
        page.click(".samples li:first-child .card")
        page.until_answered()
        assert agrees(page.answer, CARDS[0].answer), f"{page.answer!r}, expected {CARDS[0].answer!r}"

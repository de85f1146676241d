"""The cards of the chat page are those that were chosen, and an answer is judged by what it says."""

from __future__ import annotations

import json

import pytest

from models.page_samples import FOLDER, agrees, chosen_samples


def test_the_page_offers_the_chosen_samples():
    offered = json.loads((FOLDER / "samples.json").read_text())
    drawn = chosen_samples()
    assert [(card["question"], card["answer"], card["files"]) for card in offered] == [
        (sample.question, sample.answer, list(sample.files)) for sample in drawn
    ], "run `python -m models.page_samples`"


@pytest.mark.parametrize(
    ("answer", "truth", "is_right"),
    [
        ("5", "There are 5 stars.", True),
        ("There are five stars.", "There are 5 stars.", True),
        ("There are 4 stars.", "There are 5 stars.", False),
        ("There are 5 hearts.", "There are 5 stars.", False),
        ("有4个三角形。", "有4个三角形。", True),
        ("A red heart and a purple ring.", "A purple ring and a red heart.", True),
        ("A red heart.", "A purple ring and a red heart.", False),
        ("A red ring and a purple heart", "A purple ring and a blue heart.", False),
        ("Right.", "It moves to the right.", True),
        ("It moves to the left.", "It moves to the right.", False),
        ("The ring is brown.", "Brown.", True),
        ("Pink.", "Brown.", False),
        ("Picture 2.", "Picture 2.", True),
        ("Picture 1.", "Picture 2.", False),
        ("", "4072", False),
    ],
)
def test_answers_are_judged_by_numbers_things_and_ways(answer: str, truth: str, is_right: bool):
    assert agrees(answer, truth) is is_right

"""The evaluation's tables: the latest column of each way, and a word about every aim that is missed."""

from __future__ import annotations

import pytest

from models.demo_training.skills import SKILLS
from tests.bench.bench_eval import WAYS, Questions, _clock
from tests.bench.eval_table import AIMS, console_table, markdown_table, mean_of
from tests.bench.result_files import ROOT, Result

PERFECT = {**dict.fromkeys(SKILLS, 1.0), "samples": 200, "seconds": 60.0}


def make_result(name: str, date: str, **ways: dict[str, float]) -> Result:
    figures = {way.replace("_", " "): {"samples": 200, **shares} for way, shares in ways.items()}
    path = ROOT / "tests" / "bench" / "results" / f"{name}.json"
    return Result(path, "eval", date, "0123abc", "./run.sh eval", {}, {}, figures)


def test_every_aim_names_a_skill_and_every_way_has_its_own_name():
    assert AIMS.keys() <= SKILLS.keys()
    assert len({way.name for way in WAYS}) == len(WAYS) == 6


def test_the_mean_counts_skills_only():
    assert mean_of({"shapes": 0.5, "counts": 1.0, "samples": 200, "seconds": 9.0}) == 0.75


def test_a_table_without_misses_says_so():
    assert console_table({"bfloat16 TP 1": PERFECT}).endswith("every aim is reached")


@pytest.mark.parametrize(
    ("columns", "missed"),
    [
        ({"bfloat16 TP 8": {**PERFECT, "digits": 0.94}}, "bfloat16 TP 8: digits 94.0 %, aim 95 %"),
        ({"bfloat16 TP 1": PERFECT, "wint8 TP 1": {**PERFECT, "shapes": 0.78}}, "1.2 points below"),
        ({"bfloat16 TP 1": PERFECT, "wint4 TP 1": {**PERFECT, "shapes": 0.4}}, "3.3 points below"),
    ],
)  # fmt: skip
def test_what_an_aim_misses_is_said(columns, missed: str):
    assert missed in console_table(columns)


def test_wint4_may_lose_two_points_of_the_mean():
    columns = {"bfloat16 TP 1": PERFECT, "wint4 TP 1": {**PERFECT, "shapes": 0.7}}
    assert "wint4" not in console_table(columns).split("missed", 1)[-1].split("\n", 1)[-1]


def test_a_page_shows_the_latest_run_of_each_way():
    results = [
        make_result("old", "1", bfloat16_TP_1={"shapes": 0.1}, wint4_TP_8={"shapes": 0.2}),
        make_result("new", "2", bfloat16_TP_1={"shapes": 0.98}),
    ]
    head, _, shapes, mean, count = markdown_table(results, ROOT / "README.md").splitlines()
    assert head == (
        "| skill | [bfloat16 TP 1](tests/bench/results/new.json) | "
        "[wint4 TP 8](tests/bench/results/old.json) | aim |"
    )
    assert shapes == "| shapes | 98.0 % | 20.0 % | 97 % |"
    assert mean.startswith("| **mean** | 98.0 % | 20.0 %") and "200" in count


def test_a_page_marks_an_aim_that_bfloat16_misses():
    results = [make_result("kept", "1", bfloat16_TP_1={"shapes": 0.96, "digits": 0.95, "moment": 0.1})]
    _, _, *rows, _, _ = markdown_table(results, ROOT / "README.md").splitlines()
    assert rows == [
        "| shapes | 96.0 % | 97 %, missed |",
        "| digits | 95.0 % | 95 % |",
        "| moment | 10.0 % |  |",
    ]


def test_without_a_run_the_page_says_how_to_make_one():
    assert "./run.sh eval" in markdown_table([], ROOT / "README.md")


def test_a_sample_is_drawn_once_and_asked_alike_in_every_way():
    asked = []

    class Server:
        def answer_to(self, body):
            asked.append(body)
            return "nonsense"

    questions = Questions(seed=0)
    assert [questions.ask(Server(), "digits", 3) for _ in range(2)] == [False, False]
    assert asked[0] == asked[1]
    assert asked[0]["temperature"] == 0 and asked[0]["messages"][-1]["role"] == "user"


def test_times_are_told_in_minutes_and_hours():
    assert (_clock(75.4), _clock(3700)) == ("1:15", "1:01:40")

"""Every figure of the READMEs' tables is that of the latest result kept under tests/bench/results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import result_files, tables
from tests.bench.result_files import ROOT, Result, read_results, save
from tests.bench.tables import Row, expected_pages, make_table


def make_result(date: str = "2026-01-01T00:00:00+00:00", speed: float = 1.0, **settings: object) -> Result:
    path = ROOT / "tests" / "bench" / "results" / f"cpu-{date}.json"
    figures = {"decode": {"tokens_per_second": speed}}
    return Result(path, "cpu", date, "0123abc", "./run.sh bench cpu --save", {}, settings, figures)


ROW = Row("decode", "cpu", lambda f: f"{f['decode']['tokens_per_second']:.0f} tok/s", "9", {"layers": 8})


def test_tables_of_the_readmes_are_those_of_the_latest_results():
    stale = [str(path) for path, text in expected_pages().items() if path.read_text() != text]
    assert not stale, f"run `.venv/bin/python -m tests.bench.tables`: {stale} show other figures"


def test_main_readme_shows_figures_that_are_kept():
    text = (ROOT / "README.md").read_text()
    assert "<!-- figures: main -->" in text
    assert "tests/bench/results/cpu-" in text


def test_every_row_of_a_table_can_be_made_from_the_files_that_are_kept():
    results = read_results()
    for rows in tables.TABLES.values():
        lines = make_table(rows, results, ROOT / "README.md").splitlines()
        shown = [row for row in rows if any(row.is_from(result) for result in results)]
        assert len(lines) == len(tables._HEAD) + len(shown)
        assert all(line.count("|") == 5 for line in lines)


def test_row_shows_the_latest_run_with_its_settings():
    results = [
        make_result("2026-01-01T00:00:00+00:00", 1.0, layers=8),
        make_result("2026-01-02T00:00:00+00:00", 2.0, layers=8),
        make_result("2026-01-03T00:00:00+00:00", 3.0, layers=3),
    ]
    (line,) = make_table([ROW], results, ROOT / "workers" / "README.md").splitlines()[2:]
    link = "../tests/bench/results/cpu-2026-01-02T00:00:00+00:00.json"
    assert line == f"| decode | 2 tok/s | 9 | [`./run.sh bench cpu`]({link}) |"


def test_row_without_a_kept_run_is_left_out():
    assert make_table([ROW], [make_result(layers=3)], ROOT / "README.md").splitlines() == list(tables._HEAD)


def test_saved_figures_come_back_with_machine_date_and_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(result_files.sys, "argv", ["bench_cpu.py", "--layers", "8", "--save"])
    path = save(
        "cpu",
        {"decode": {"tokens_per_second": 12.3456789, "gap": float("nan")}},
        {"layers": 8},
        folder=tmp_path,
    )
    (result,) = read_results(tmp_path)
    assert result.path == path and result.settings == {"layers": 8}
    assert result.figures == {"decode": {"tokens_per_second": 12.346, "gap": None}}
    assert result.command == "./run.sh bench cpu --layers 8 --save"
    assert result.machine["threads"] >= 1 and result.machine["processor"]
    assert result.date.endswith("+00:00") and result.commit


def test_file_in_another_format_is_refused(tmp_path: Path):
    (tmp_path / "cpu-1.json").write_text(json.dumps({"bench": "cpu", "results": []}))
    with pytest.raises(ValueError, match="needs exactly the fields"):
        read_results(tmp_path)

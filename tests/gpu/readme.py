"""The table of this folder's README, made from the newest result of each device."""

from __future__ import annotations

from pathlib import Path

from tests.bench.result_files import Result, read_results

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- results: made by readme.py -->", "<!-- end of results -->"
NOTHING = "No GPU has run this yet: the kernels are proven by the emulator and compiled by nvcc."


def update_readme(folder: Path, readme: Path = README) -> None:
    """Replace what stands between the two marks."""
    text = readme.read_text()
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    readme.write_text(f"{head}{BEGIN}\n\n{tables(folder)}\n\n{END}{tail}")


def tables(folder: Path) -> str:
    newest: dict[str, Result] = {}
    for result in read_results(folder) if folder.is_dir() else []:  # oldest first
        newest[str(result.machine.get("gpu", ""))] = result
    return "\n\n".join(_table(gpu, result) for gpu, result in sorted(newest.items())) or NOTHING


def _table(gpu: str, result: Result) -> str:
    lines = [f"{gpu}, {result.date[:10]}, commit {result.commit}", "", "| what | figures |", "|---|---|"]
    for name, found in result.figures.items():
        lines.append(f"| {name} | {', '.join(_figure(*item) for item in found.items())} |")
    return "\n".join(lines)


def _figure(measure: str, value: object) -> str:
    return f"{measure} {value:.4g}" if isinstance(value, int | float) else f"{measure} {value}"

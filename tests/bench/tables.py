"""The tables of figures in the READMEs, made from tests/bench/results: `python -m tests.bench.tables`.

A table stands between `<!-- figures: NAME -->` and `<!-- end of figures -->`. A row says what was measured,
the figure, what it should be, and the command, which links to the file with machine, date and commit. It
comes from the latest result of its bench whose settings match, and is left out while there is none. A
benchmark's --save calls `update`; a test fails when a table is stale.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.eval_table import markdown_table
from tests.bench.result_files import ROOT, Result, read_results

_BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
_HEAD = ("| what | figure | aim | kept run |", "|---|---|---|---|")


@dataclass(frozen=True)
class Row:
    """`text` makes the figure of a result's `figures`; `settings` are those that a result must have."""

    what: str
    bench: str
    text: Callable[[dict[str, dict[str, Any]]], str]
    aim: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def is_from(self, result: Result) -> bool:
        wanted = self.settings.items()
        return result.bench == self.bench and all(result.settings.get(key) == value for key, value in wanted)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def against_llama(*measured: dict[str, Any]) -> str:
    """', 1.0x / 2.0x llama.cpp': medians of a run that had the peer; nothing without it."""
    ratios = [sorted(one.get("ratio_to_llama_cpp") or []) for one in measured]
    if not all(ratios):
        return ""
    return ", " + " / ".join(f"{median(one):.2g}x" for one in ratios) + " llama.cpp"


def decoded(f: dict[str, dict[str, Any]]) -> str:
    """Batch 1 / batch 16."""
    one, sixteen = f["decode batch 1"], f["decode batch 16"]
    rates = f"{one['tokens_per_second_median']:.0f} / {sixteen['tokens_per_second_median']:.0f} tok/s"
    shares = f"{percent(one['share_of_peak_median'])} / {percent(sixteen['share_of_peak_median'])}"
    return f"{rates}, {shares} of read bandwidth{against_llama(one, sixteen)}"


def decoded_and_prefilled(f: dict[str, dict[str, Any]]) -> str:
    """All of the above on another machine."""
    prefill = f["prefill 512"]
    return f"{decoded(f)}; {prefill['tokens_per_second_median']:.0f} tok/s{against_llama(prefill)}"


A3B_8L = {"layers": 8, "quantization": "wint4", "busy": 0, "instructions": "avx512"}

# name in the marker -> rows
TABLES: dict[str, Sequence[Row]] = {
    "main": (
        Row(
            "decode, 21B-A3B cut to 8 layers, wint4, batch 1 / 16",
            "cpu",
            decoded,
            "90 % of bandwidth, 1x / 1.5x llama.cpp",
            A3B_8L,
        ),
        Row(
            "the same, wint4-all: 4.5 bits a weight as in llama.cpp's Q4_0",
            "cpu",
            decoded,
            "1x / 1.5x llama.cpp",
            A3B_8L | {"quantization": "wint4-all"},
        ),
        Row(
            "the same, wint4, beside a process that keeps one of the two cores busy",
            "cpu",
            decoded,
            "two thirds of the speed alone",
            A3B_8L | {"busy": 1},
        ),
        Row(
            "prefill of 512 tokens, same model",
            "cpu",
            lambda f: (
                f"{f['prefill 512']['tokens_per_second_median']:.0f} tok/s, "
                f"{percent(f['prefill 512']['share_of_peak_median'])} of the int8 peak"
                + against_llama(f["prefill 512"])
            ),
            "3x llama.cpp",
            A3B_8L,
        ),
        Row(
            "on a CPU without AVX-512, wint4: decode, batch 1 / 16; prefill",
            "cpu",
            decoded_and_prefilled,
            "90 % of bandwidth, 1x / 1.5x; 3x llama.cpp",
            A3B_8L | {"instructions": "avx2"},
        ),
        Row(
            "the same, wint4-all",
            "cpu",
            decoded_and_prefilled,
            "1x / 1.5x; 3x llama.cpp",
            A3B_8L | {"instructions": "avx2", "quantization": "wint4-all"},
        ),
        Row(
            "28B-A3B whole, wint4, random weights: decode after text / after a picture, resident memory",
            "large",
            lambda f: (
                f"{f['text']['tokens_per_second']:.1f} / {f['picture']['tokens_per_second']:.1f} tok/s, "
                f"{f['memory']['peak_resident_gib']:.1f} GiB"
            ),
            "under 20 GiB",
            {"model": "ernie-4.5-vl-28b-a3b", "quantization": "wint4"},
        ),
        Row(
            "8.7 GB of bf16 to wint4, from command to ready: cold / warm",
            "start",
            lambda f: (
                f"{f['cold']['ready_seconds']:.0f} / {f['warm']['ready_seconds']:.1f} s, "
                f"{f['cold over warm']['ready']:.0f}x; {f['cold']['peak_above_gb']:.1f} GB beside the weights"
            ),
            "5x, under 4 GB",
            {"layers": 6, "quantization": "wint4", "tp": 1, "drop": False},
        ),
        Row(
            "product 2560x3584 on 512 rows, int8 / int4 / bf16",
            "ops",
            lambda f: (
                " / ".join(
                    f"{f[f'linear bfloat16 x {kind} M=512 2560x3584']['gflop_per_second']:.0f}"
                    for kind in ("int8", "int4", "bfloat16")
                )
                + " GFLOP/s"
            ),
        ),
        Row(
            "all-reduce of 8 KB between 8 processes",
            "ops",
            lambda f: f"{f['all_reduce 8 ranks, 8192 bytes']['microseconds']:.0f} us",
        ),
        Row(
            "engine, host time per step, 256 sequences, cores kept awake",
            "engine",
            lambda f: (
                f"{f['256 running']['host_us_median']:.0f} us median, "
                f"{f['256 running']['host_us_p99'] / 1e3:.1f} ms p99"
            ),
            "300 us, 1 ms",
            {"pause": False, "cores_awake": True},
        ),
        Row(
            "api, streamed tokens per second of one process",
            "api",
            lambda f: f"{max(one['delivered_per_second'] for one in f.values()):,.0f}",
            "500,000",
        ),
        Row(
            "images prepared per second and core, 1024x768 JPEG",
            "media",
            lambda f: f"{f['image 1024x768']['images_per_second']:.0f}",
            "200",
        ),
    ),
}


def update(root: Path = ROOT) -> list[Path]:
    """Write every table anew; returns the files that changed."""
    changed = []
    for path, text in expected_pages(root).items():
        if path.read_text() != text:
            path.write_text(text)
            changed.append(path)
    return changed


def expected_pages(root: Path = ROOT) -> dict[Path, str]:
    """Every Markdown file that has tables, as it should read."""
    results = read_results()
    pages = {}
    for path in _pages(root):
        text = path.read_text()
        if _BLOCK.search(text):
            pages[path] = _BLOCK.sub(lambda match, at=path: _fill(match, results, at), text)
    return pages


def make_table(rows: Sequence[Row], results: Sequence[Result], page: Path) -> str:
    """The Markdown of one table; links are relative to `page`."""
    lines = list(_HEAD)
    for row in rows:
        matching = [result for result in results if row.is_from(result)]
        if matching:
            lines.append(_line(row, matching[-1], page))
    return "\n".join(lines)


def _line(row: Row, result: Result, page: Path) -> str:
    link = os.path.relpath(result.path, page.parent)
    command = result.command.replace(" --save", "")
    return f"| {row.what} | {row.text(result.figures)} | {row.aim} | [`{command}`]({link}) |"


def _fill(match: re.Match[str], results: Sequence[Result], page: Path) -> str:
    if match[2] == "eval":
        return f"{match[1]}{markdown_table(results, page)}\n{match[3]}"
    if match[2] not in TABLES:
        raise ValueError(f"{page} asks for the table '{match[2]}'; there are eval, {', '.join(TABLES)}")
    return f"{match[1]}{make_table(TABLES[match[2]], results, page)}\n{match[3]}"


def _pages(root: Path) -> list[Path]:
    folders = (root, *(path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] not in "._"))
    found = [page for folder in folders for page in sorted(folder.glob("*.md"))]
    deeper = ("docs", "models", "tests")
    return found + sorted(page for name in deeper for page in (root / name).glob("*/**/*.md"))


if __name__ == "__main__":
    for changed_page in update():
        print(f"{changed_page.relative_to(ROOT)} is up to date", file=sys.stderr)

"""How many fresh samples of each skill the demo model answers right, in every way of serving it.

Method      For each way (format and number of ranks) the server is started as users start it and asked over
            the OpenAI API, several requests at a time, greedy; thinking, tools and pictures go through the
            real parsers. Samples are drawn by the generators of models/demo_training from a space that
            training never uses, the same for every way.
How to read Shares of right answers. The standard error of a share p is sqrt(p (1 - p) / samples): with 200
            samples 1.5 points at 95 %. What an aim misses is marked.
Run         ./run.sh eval [--samples 200 | --quick] [--ways "bfloat16 TP 1,wint4 TP 8"] [--skills A,B]
            [--save]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.model_source import DEMO
from models.demo_training.evaluate_served import Server
from models.demo_training.sample import Sample, rng_for
from models.demo_training.scores import Score, is_right
from models.demo_training.skills import SKILLS
from models.demo_training.wire import chat_request
from tests.bench.eval_table import console_table
from tests.bench.result_files import heading, save, save_option
from tests.e2e.server import running_server

QUICK_SAMPLES = 20
_BAR = 30  # characters


@dataclass(frozen=True)
class Way:
    """One way of serving; its name is a column of the table."""

    format: str
    ranks: int

    @property
    def name(self) -> str:
        return f"{self.format} TP {self.ranks}"

    @property
    def flags(self) -> tuple[str, ...]:
        return ("--quant", self.format, "--tp", str(self.ranks))


WAYS = [Way(quantization, ranks) for ranks in (1, 8) for quantization in ("bfloat16", "wint8", "wint4")]


class Questions:
    """Samples as request bodies, drawn when they are first asked for and kept for the next way."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._drawn: dict[tuple[str, int], tuple[bytes, Sample]] = {}

    def ask(self, server: Server, skill: str, index: int) -> bool:
        """Whether the answer to this sample is right."""
        if (skill, index) not in self._drawn:
            sample = SKILLS[skill](rng_for("evaluation", self._seed, skill, index))
            body = json.dumps(chat_request(sample, "octet-demo")).encode()
            self._drawn[skill, index] = (
                body,
                dataclasses.replace(sample, messages=[]),
            )  # without its pictures
        body, sample = self._drawn[skill, index]
        return is_right(sample, server.answer_to(json.loads(body)))


@dataclass
class Progress:
    """The line at the bottom of a terminal: this way's bar, and the time left for all of them."""

    total: int
    started: float = field(default_factory=time.monotonic)
    done: int = 0

    def show(self, way: str, skill: str, right: int, done: int, total: int) -> None:
        self.done += 1
        if not sys.stderr.isatty():
            return
        left = (time.monotonic() - self.started) * (self.total - self.done) / self.done
        filled = _BAR * done // total
        bar = "#" * filled + "." * (_BAR - filled)
        share = 100 * right / done
        line = (
            f"{way:15s} [{bar}] {done}/{total}  {share:5.1f} % right  {skill:12s}  {_clock(left)} left in all"
        )
        print(f"\r{line:110s}", end="", file=sys.stderr, flush=True)

    def end_line(self) -> None:
        if sys.stderr.isatty():
            print(file=sys.stderr)


def evaluate(
    url: str, way: str, questions: Questions, skills: Sequence[str], samples: int, parallel: int,
    progress: Progress,
) -> dict[str, Score]:  # fmt: skip
    """Scores of one running server. The samples of a skill are asked together, so they run as batches."""
    server = Server(url)
    scores = {skill: Score() for skill in skills}
    numbered = [(skill, index) for skill in skills for index in range(samples)]
    right = 0
    with ThreadPoolExecutor(parallel) as pool:
        asked = pool.map(lambda pair: (pair[0], questions.ask(server, *pair)), numbered)
        for done, (skill, is_correct) in enumerate(asked, 1):
            right += is_correct
            scores[skill].right += is_correct
            scores[skill].total += 1
            progress.show(way, skill, right, done, len(numbered))
    progress.end_line()
    return scores


def run(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Figures by way: shares by skill, and the seconds that it took."""
    skills, ways = options.skills.split(","), list(_chosen(options.ways))
    questions = Questions(options.seed)
    progress = Progress(len(ways) * len(skills) * options.samples)
    figures: dict[str, dict[str, Any]] = {}
    for way in ways:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            flags = ("--model", options.model, *way.flags)
            with running_server(Path(folder), *flags) as server:
                scores = evaluate(
                    server.address, way.name, questions, skills, options.samples, options.parallel, progress
                )
        seconds = time.monotonic() - began
        figures[way.name] = {skill: score.share for skill, score in scores.items()}
        figures[way.name] |= {"samples": options.samples, "seconds": seconds}
        mean = sum(score.share for score in scores.values()) / len(scores)
        print(f"{way.name}: {100 * mean:.1f} % right, {_clock(seconds)}", flush=True)
    return figures


def _chosen(names: str) -> Iterator[Way]:
    by_name = {way.name: way for way in WAYS}
    for name in names.split(","):
        if name.strip() not in by_name:
            raise SystemExit(f"there is no way of serving named {name!r}; choose among {', '.join(by_name)}")
        yield by_name[name.strip()]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run.sh eval", description="Score the demo model over the API.")
    parser.add_argument("--model", default=str(DEMO), help="its folder")
    parser.add_argument("--samples", type=int, default=200, help="per skill and way")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SAMPLES} samples per skill and way")
    parser.add_argument("--ways", default=",".join(way.name for way in WAYS), help="of serving, by name")
    parser.add_argument("--skills", default=",".join(SKILLS))
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--parallel", type=int, default=16, help="requests at a time")
    save_option(parser)
    options = parser.parse_args()
    if options.quick:
        options.samples = QUICK_SAMPLES
    unknown = set(options.skills.split(",")) - SKILLS.keys()
    if unknown:
        parser.error(f"unknown skills {', '.join(sorted(unknown))}; choose among {', '.join(SKILLS)}")
    if not (Path(options.model) / "config.json").is_file():
        parser.error(f"{options.model} holds no model; give one with --model")
    print(heading())
    figures = run(options)
    print(console_table(figures))
    if options.save:
        save(
            "eval",
            figures,
            {"samples": options.samples, "seed": options.seed, "model": Path(options.model).name},
        )


if __name__ == "__main__":
    main()

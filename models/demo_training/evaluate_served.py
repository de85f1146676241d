"""How many fresh samples of each skill a running server answers right.

    python -m models.demo_training.evaluate_served --url http://127.0.0.1:8000 --save RUN --name "wint4 TP 8"

Asks over the OpenAI API, several requests at a time, with a progress bar on a terminal, and prints a table.
--save adds the column to RUN/evaluation.json, from which export.py writes the model card.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from models.demo_training.sample import Sample, rng_for
from models.demo_training.scores import Score, is_right, save, table
from models.demo_training.skills import SKILLS
from models.demo_training.wire import chat_request, written_text

TIMEOUT = 300.0  # seconds for one answer


class Server:
    """An OpenAI endpoint; its first model is asked."""

    def __init__(self, url: str, key: str = "") -> None:
        self._url, self._key = url.rstrip("/"), key
        self.model: str = self._call("/v1/models")["data"][0]["id"]

    def answer(self, sample: Sample) -> str:
        return self.answer_to(chat_request(sample, self.model))

    def answer_to(self, body: dict[str, Any]) -> str:
        """What the model wrote, reasoning first, for the body of a chat request."""
        answer = self._call("/v1/chat/completions", body)
        return written_text(answer["choices"][0]["message"])

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Raises RuntimeError with the server's own words when it refuses."""
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self._key}"} if self._key else {}
        )
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise RuntimeError(
                f"{path} answered {error.code}: {error.read().decode(errors='replace')}"
            ) from None


def evaluate_served(
    server: Server, skills: list[str], samples: int, seed: int, parallel: int
) -> dict[str, Score]:
    scores = {skill: Score() for skill in skills}
    with ThreadPoolExecutor(parallel) as pool:
        numbered = [(skill, index) for skill in skills for index in range(samples)]
        asked = pool.map(lambda pair: _ask(server, pair[0], pair[1], seed), numbered)
        for skill, right in _with_bar(asked, len(skills) * samples):
            scores[skill].right += right
            scores[skill].total += 1
    return scores


def _ask(server: Server, skill: str, index: int, seed: int) -> tuple[str, bool]:
    """Draws the sample here, so that never more than a few are in memory."""
    sample = SKILLS[skill](rng_for("evaluation", seed, skill, index))
    return skill, is_right(sample, server.answer(sample))


def _with_bar(answers: Iterator[tuple[str, bool]], total: int) -> Iterator[tuple[str, bool]]:
    right = 0
    for done, (skill, is_correct) in enumerate(answers, 1):
        right += is_correct
        if sys.stderr.isatty():
            filled = 40 * done // total
            bar = "#" * filled + "." * (40 - filled)
            print(
                f"\r[{bar}] {done}/{total}  {100 * right / done:.1f} %  {skill:14s}", end="", file=sys.stderr
            )
        yield skill, is_correct
    if sys.stderr.isatty():
        print(file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.demo_training.evaluate_served")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="", help="API key, if the server asks for one")
    parser.add_argument("--samples", type=int, default=200, help="per skill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skills", default=",".join(SKILLS))
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--save", type=Path, help="run folder that collects the columns of the model card")
    parser.add_argument("--name", default="", help="of the column, such as 'wint4 TP 8'")
    options = parser.parse_args()
    if options.save and not options.name:
        parser.error("--save needs --name")
    server = Server(options.url, options.key)
    scores = evaluate_served(
        server, options.skills.split(","), options.samples, options.seed, options.parallel
    )
    print(table(scores))
    if options.save:
        save(options.save, options.name, scores)


if __name__ == "__main__":
    main()

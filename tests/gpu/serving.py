"""The 28B preset whole on one GPU, asked over HTTP as its published benchmark asks.

Method
    The real api, engine and worker, with random weights. So many clients each send the next request when
    theirs has ended: about 3,300 tokens of prompt with one image, exactly 750 of answer, greedy. How many
    words make 3,300 tokens is found out first. Prompts begin differently, so that no prefix is cached.
Bytes and flops
    Those of the model; see rank_step.py.
How to read it
    total_tokens_per_second counts prompts and answers, as the published figure does; first_ms is the time to
    the first text, gap_ms between two texts of one stream.
Reference
    FastDeploy on one H800, wint4: 7,450 total tokens per second (anchors.md of the design, B.5)
Run
    python -m tests.gpu.serving [--address http://host:port] [-- FLAGS of the server]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.model_source import TINY_NAME
from tests.bench.bench_serving import percentile
from tests.bench.serving_client import Client, Record
from tests.bench.serving_load import Conversation, Turn
from tests.e2e.media import image_part
from tests.e2e.server import ROOT, Server, free_port
from tests.gpu.figures import Figures, add_options, show

PRESET = "ernie-4.5-vl-28b-a3b"
FLAGS = (
    "--model", PRESET, "--load-format", "dummy", "--quantization", "wint4",
    "--device", "gpu", "--framework", "torch", "--max-model-len", "8192", "--max-num-seqs", "128",
)  # fmt: skip
START_SECONDS = 150.0
PICTURES = 8  # different ones; each has its tokens encoded once per run and size
_SYLLABLES = ("ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu")


@dataclass(frozen=True)
class Load:
    """What each request asks."""

    prompt_tokens: int = 3300
    answer_tokens: int = 750
    picture: tuple[int, int] = (448, 448)  # pixels
    clients: tuple[int, ...] = (1, 16, 100)
    requests_per_client: int = 2


@contextmanager
def started_server(folder: Path, flags: Sequence[str]) -> Iterator[Server]:
    """The server on this interpreter, which installs and downloads nothing."""
    port, metrics_port, log = free_port(), free_port(), folder / "server.log"
    command = [
        sys.executable,
        "-m",
        "engine",
        "--port",
        str(port),
        "--metrics-port",
        str(metrics_port),
        *flags,
    ]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": path}, cwd=folder
        )
    server = Server(process, port, metrics_port, log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while server.get("/ready")[0] != 200:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{server.log[-2000:]}")
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def words(source: random.Random, count: int) -> str:
    return " ".join("".join(source.choices(_SYLLABLES, k=2)) for _ in range(count))


def conversation(name: str, load: Load, num_words: int, seed: int) -> Conversation:
    source = random.Random(seed)
    picture = image_part(source.randrange(PICTURES), *load.picture)
    content: list[dict[str, Any]] = [picture, {"type": "text", "text": words(source, num_words)}]
    return Conversation(name, "client", 0.0, words(source, 8), [Turn(content, load.answer_tokens)])


def play(address: str, conversations: Sequence[Conversation], num_clients: int) -> list[Record]:
    records = asyncio.run(Client(address).play(conversations, num_clients))
    if wrong := [record.error for record in records if record.error]:
        raise RuntimeError(f"{len(wrong)} of {len(records)} requests failed; the first: {wrong[0]}")
    return records


def words_for(address: str, load: Load) -> int:
    """How many words make a prompt of load.prompt_tokens, by two prompts of other lengths."""
    lengths = (20, 120)
    probes = [conversation(f"probe-{n}", Load(answer_tokens=1, picture=load.picture), n, n) for n in lengths]
    few, many = (play(address, [probe], 1)[0].num_prompt_tokens for probe in probes)
    per_word = (many - few) / (lengths[1] - lengths[0])
    return max(1, round(lengths[0] + (load.prompt_tokens - few) / per_word))


def measure_serving(address: str, load: Load, title: str = "serving") -> Figures:
    """{"<title>, N clients": {measure: number}}."""
    num_words = words_for(address, load)
    figures = {}
    for clients in load.clients:
        asked = [
            conversation(f"{clients}-{i}", load, num_words, clients * 1000 + i)
            for i in range(clients * load.requests_per_client)
        ]
        figures[f"{title}, {clients} clients"] = _summary(play(address, asked, clients))
    return figures


def _summary(records: Sequence[Record]) -> dict[str, Any]:
    seconds = max(record.ended for record in records)
    prompts = sum(record.num_prompt_tokens for record in records)
    answers = sum(record.num_output_tokens for record in records)
    firsts = [record.first_token * 1e3 for record in records]
    gaps = [gap * 1e3 for record in records for gap in record.gaps]
    return {
        "requests": len(records),
        "prompt_tokens": prompts / len(records),
        "output_tokens_per_second": answers / seconds,
        "total_tokens_per_second": (prompts + answers) / seconds,
        "first_ms_p50": percentile(firsts, 0.5),
        "first_ms_p99": percentile(firsts, 0.99),
        "gap_ms_p50": percentile(gaps, 0.5),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", default="", help="of a server that runs already")
    parser.add_argument("--small", action="store_true", help="the tiny model on the CPU, for a few requests")
    parser.add_argument("--clients", type=int, action="append", help="how many at once; may be repeated")
    parser.add_argument("--title", default="serving", help="what the figures are called")
    parser.add_argument("flags", nargs="*", help="for the server, after --")
    add_options(parser)
    asked = parser.parse_args()
    load = Load(300, 8, (56, 56), (1, 2), 1) if asked.small else Load()
    load = replace(load, clients=tuple(asked.clients or load.clients))
    if asked.address:
        show(measure_serving(asked.address, load, asked.title), asked.json)
        return 0
    flags = ("--model", TINY_NAME, "--device", "cpu") if asked.small else FLAGS
    with (
        tempfile.TemporaryDirectory() as folder,
        started_server(Path(folder), [*flags, *asked.flags]) as server,
    ):
        show(measure_serving(server.address, load, asked.title), asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

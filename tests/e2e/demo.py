"""The demo model served in several ways, and the samples that its end-to-end tests ask.

demo_samples.json names one sample of each skill that the model answers right in all of SETUPS, and openly the
skills that it cannot do yet. It is chosen by choose_demo_samples.py for exactly one set of weights.
"""

from __future__ import annotations

import hashlib
import json
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.model_source import DEMO
from models.demo_training.sample import Sample, rng_for
from models.demo_training.scores import is_right
from models.demo_training.skills import SKILLS
from models.demo_training.wire import chat_request, written_text

SAMPLES = Path(__file__).with_name("demo_samples.json")
SEED = 1  # of the evaluation space; ./run.sh eval draws from seed 0
_TIMEOUT = 120.0  # seconds for one answer of eight ranks on two busy cores


@dataclass(frozen=True)
class Setup:
    """One way of serving."""

    format: str
    ranks: int
    chunk: int  # tokens per step at most

    @property
    def name(self) -> str:
        return f"{self.format}-tp{self.ranks}-chunk{self.chunk}"

    @property
    def flags(self) -> tuple[str, ...]:
        return (
            "--quant", self.format, "--tp", str(self.ranks), "--max-num-batched-tokens", str(self.chunk),
            "--kv-cache-memory", "256MiB", "--image-cache", "16MiB", "--max-num-seqs", "32",
        )  # fmt: skip


# Formats, numbers of ranks and chunk sizes, each with each.
SETUPS = tuple(
    Setup(name, ranks, chunk) for name in ("bfloat16", "wint4") for ranks in (1, 8) for chunk in (16, 384)
)


@dataclass(frozen=True)
class Chosen:
    """The content of demo_samples.json."""

    model: str  # digest of the weights
    right: dict[str, int]  # skill -> index of the sample
    not_yet: dict[str, str]  # skill -> what the model did instead


def read_chosen() -> Chosen:
    return Chosen(**json.loads(SAMPLES.read_text()))


def model_digest() -> str:
    """Of the weights that models/demo holds."""
    return hashlib.sha256((DEMO / "model.safetensors").read_bytes()).hexdigest()[:16]


def draw(skill: str, index: int) -> Sample:
    return SKILLS[skill](rng_for("evaluation", SEED, skill, index))


def ask(address: str, sample: Sample, **changes: Any) -> dict[str, Any]:
    """The one choice of a whole answer, with log-probabilities of the two best tokens at every place."""
    wanted = {"logprobs": True, "top_logprobs": 2, **changes}
    body = json.dumps({**chat_request(sample, "octet-demo"), **wanted}).encode()
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        choice: dict[str, Any] = json.load(response)["choices"][0]
    return choice


def ask_all(address: str, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The choices of all samples, asked together."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda sample: ask(address, sample), samples))


def is_answered(sample: Sample, choice: dict[str, Any]) -> bool:
    """Right, and ended by the model itself."""
    return choice["finish_reason"] != "length" and is_right(sample, written_text(choice["message"]))


def margin(choice: dict[str, Any]) -> float:
    """How far the second best token stays behind at the closest place, in nats."""
    gaps = [
        entry["top_logprobs"][0]["logprob"] - entry["top_logprobs"][1]["logprob"]
        for entry in choice["logprobs"]["content"]
    ]
    return min(gaps, default=0.0)

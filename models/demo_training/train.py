"""Trains the demo model.

    python -m models.demo_training.train --out RUN --device cuda --minutes 27
    python -m models.demo_training.train --out RUN --device cpu --samples 300000

A run is a folder: tokenizer/, checkpoint/, log.jsonl. Calling again with the same folder goes on where it
stopped. --samples makes a run that depends on its seed alone; --minutes fits the schedule to the clock
instead.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from models.demo_training import checkpoint
from models.demo_training.balance import LoadBalancer
from models.demo_training.checkpoint import Progress
from models.demo_training.collate import MicroBatch
from models.demo_training.config import demo_model, mini_model
from models.demo_training.encode import Encoder
from models.demo_training.evaluate import evaluate
from models.demo_training.fake_quant import quantised
from models.demo_training.feed import Feed, FeedSettings
from models.demo_training.forward import Normaliser, sample_losses, to_device
from models.demo_training.model import Model, build_model, decays
from models.demo_training.progress import Reporter
from models.demo_training.scores import table
from models.demo_training.skills import SKILLS
from models.demo_training.tokenizer import write_tokenizer_folder

WEIGHT_DECAY = 0.05
MAX_GRADIENT_NORM = 1.0
FINAL_RATE = 0.02  # of the peak, at the end of the cosine


@dataclass(frozen=True)
class Settings:
    """One run. What stands above `device` must stay the same when it goes on."""

    out: Path
    seed: int = 0
    model: str = "demo"  # or "mini"
    samples: int = 0  # length of the run; or
    minutes: float = 0.0  # of training over all calls
    samples_per_step: int = 512
    learning_rate: float = 1.5e-3
    warmup_steps: int = 300
    quantise_from: float = 0.75  # share of the run after which experts train as int4
    only: tuple[str, ...] = ()
    max_tokens: int = 32768  # of a micro-batch
    max_patches: int = 65536
    init_from: str = ""  # weights to start from, when the run is new
    device: str = "cpu"
    workers: int = 1
    stop_after: float = 0.0  # minutes of this call
    save_every: float = 3.0  # minutes
    evaluate_every: float = 10.0  # minutes; 0 for never
    evaluation_samples: int = 16  # per skill
    report_every: float = 10.0  # seconds


class Trainer:
    """Model, optimizer and how far they are; `run` goes on until the run is over or the call's time is up."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = torch.device(settings.device)
        sizes = {"demo": demo_model, "mini": mini_model}[settings.model]()
        self.model: Model = build_model(sizes, settings.seed, settings.device)
        self.optimizer = _optimizer(self.model, settings)
        self.balancer = LoadBalancer(self.model)
        self.normalise = Normaliser(self.device)
        self.progress = Progress(settings.seed)
        self._folder = settings.out / "checkpoint"
        self._tokenizer = settings.out / "tokenizer"
        if not self._tokenizer.exists():
            write_tokenizer_folder(self._tokenizer)
        self._go_on()
        self.reporter = Reporter(settings.out / "log.jsonl", settings.report_every)

    def run(self) -> None:
        began, before = time.monotonic(), self.progress.seconds
        saved = evaluated = began
        with Feed(self.feed_settings, self.settings.workers, self.progress.step) as feed:
            while not self.is_done and not self._time_is_up(began):
                self.step(feed.next_step())
                now = time.monotonic()
                self.progress.seconds = before + now - began
                if self.reporter.is_due:
                    self._report()
                if now - saved > 60 * self.settings.save_every:
                    self.save()
                    saved = time.monotonic()
                every = 60 * self.settings.evaluate_every
                if every and now - evaluated > every:
                    self.evaluate()
                    evaluated = time.monotonic()
        if self.reporter.has_news:
            self._report()
        self.save()

    @property
    def feed_settings(self) -> FeedSettings:
        s = self.settings
        return FeedSettings(self._tokenizer, s.seed, s.samples_per_step, s.max_tokens, s.max_patches, s.only)

    @property
    def done(self) -> float:
        """Finished share of the run, from 0 to 1."""
        if self.settings.samples:
            return min(1.0, self.progress.samples / self.settings.samples)
        return min(1.0, self.progress.seconds / (60 * self.settings.minutes))

    @property
    def is_done(self) -> bool:
        return self.done >= 1.0

    def step(self, batches: list[MicroBatch]) -> None:
        """One optimizer step over all micro-batches."""
        rate = learning_rate(self.settings, self.progress.step, self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self._weights_of_this_step():
            pending = [self._backward(batch, sum(len(b.skills) for b in batches)) for batch in batches]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.balancer.update()
        for batch, losses, exact in pending:  # read only now: every read waits for the device
            self.reporter.add(batch.skills.tolist(), losses.tolist(), exact.tolist())
        self.progress.step += 1
        self.progress.samples += self.settings.samples_per_step

    def _backward(self, batch: MicroBatch, num_samples: int) -> tuple[MicroBatch, torch.Tensor, torch.Tensor]:
        """A sample weighs by the square root of its target's length: neither digits nor tool calls drown."""
        moved = to_device(batch, self.device)
        self.balancer.watch(moved)
        with torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext():
            sums, counts, exact = sample_losses(self.model, self.normalise, moved)
        (sums / counts.sqrt()).sum().div(num_samples).backward()
        return batch, (sums / counts).detach(), exact

    def _weights_of_this_step(self):  # type: ignore[no-untyped-def]
        """Late in the run experts compute as int4, with the groups of one rank and of eight in turn."""
        if self.done < self.settings.quantise_from:
            return nullcontext()
        return quantised(self.model, "wint4", ranks=8 if self.progress.step % 2 else 1)

    def save(self) -> None:
        checkpoint.save(self._folder, self.model, self.optimizer, self.progress)

    def evaluate(self) -> None:
        scores = evaluate(
            self.model,
            Encoder(self._tokenizer),
            self.settings.only or tuple(SKILLS),
            self.settings.evaluation_samples,
        )
        print(table(scores), flush=True)
        self.reporter.log(
            {"samples": self.progress.samples, "right": {skill: s.share for skill, s in scores.items()}}
        )

    def _report(self) -> None:
        shares = [float(share.max()) for share in self.balancer.shares.values()]
        self.reporter.line(
            self.progress.step,
            self.progress.samples,
            self.done,
            self.progress.seconds,
            self.optimizer.param_groups[0]["lr"],
            {"share of the busiest expert": max(shares, default=0.0)},
        )

    def _go_on(self) -> None:
        found = checkpoint.latest(self._folder)
        if found is not None:
            self.progress = checkpoint.restore(found, self.model, self.optimizer)
            if self.progress.seed != self.settings.seed:
                raise SystemExit(
                    f"{found} was made with seed {self.progress.seed}; give the same or a new --out."
                )
        elif self.settings.init_from:
            checkpoint.load_weights(self.model, Path(self.settings.init_from))

    def _time_is_up(self, began: float) -> bool:
        limit = 60 * self.settings.stop_after
        return bool(limit) and time.monotonic() - began >= limit


def learning_rate(settings: Settings, step: int, done: float) -> float:
    """Linear warm-up by steps, then a cosine over the run."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    cosine = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * warm * cosine


def _optimizer(model: Model, settings: Settings) -> torch.optim.AdamW:
    trained = checkpoint.trained_parameters(model)
    groups = [
        {"params": [p for n, p in trained.items() if decays(n, p)], "weight_decay": WEIGHT_DECAY},
        {"params": [p for n, p in trained.items() if not decays(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, settings.learning_rate, betas=(0.9, 0.98), fused=settings.device == "cuda"
    )


def parse(arguments: list[str] | None = None) -> Settings:
    """Flags are the fields of Settings."""
    default = Settings(Path())
    parser = argparse.ArgumentParser(
        prog="python -m models.demo_training.train", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=("demo", "mini"), default=default.model)
    parser.add_argument(
        "--only", type=lambda text: tuple(text.split(",")), default=(), help="skills, comma-separated"
    )
    for name in ("device", "init_from"):
        parser.add_argument(_flag(name), default=getattr(default, name))
    for name in ("seed", "samples", "samples_per_step", "warmup_steps", "max_tokens", "max_patches",
                 "evaluation_samples"):  # fmt: skip
        parser.add_argument(_flag(name), type=int, default=getattr(default, name))
    for name in ("minutes", "learning_rate", "quantise_from", "stop_after", "save_every", "evaluate_every",
                 "report_every"):  # fmt: skip
        parser.add_argument(_flag(name), type=float, default=getattr(default, name))
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    settings = Settings(**vars(parser.parse_args(arguments)))
    if bool(settings.samples) == bool(settings.minutes):
        parser.error("give the length of the run: either --samples or --minutes")
    return settings


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def main() -> None:
    settings = parse()
    settings.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings)
    if trainer.is_done:
        print(f"{settings.out} is finished; evaluate or export it, or give a new --out.")
        return
    trainer.run()


if __name__ == "__main__":
    main()

"""Trains the demo model.

    python -m models.demo_training.train --out RUN --device cuda --minutes 27
    python -m models.demo_training.train --out RUN --device cpu --samples 300000

A run is a folder: tokenizer/, checkpoint/, log.jsonl. Calling again with the same folder goes on where it
stopped. --samples makes a run that depends on its seed alone; --minutes fits the schedule to the clock
instead.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from models.demo_training import checkpoint
from models.demo_training.balance import LoadBalancer
from models.demo_training.checkpoint import Progress
from models.demo_training.collate import MicroBatch
from models.demo_training.config import demo_model, mini_model, preprocessor_config
from models.demo_training.encode import Encoder
from models.demo_training.evaluate import evaluate
from models.demo_training.export import from_paddle
from models.demo_training.fake_quant import quantised
from models.demo_training.feed import Feed, FeedSettings
from models.demo_training.forward import (
    DeviceMedia,
    Normaliser,
    answer_losses,
    media_features,
    media_to_device,
    to_device,
)
from models.demo_training.helper import Helpers
from models.demo_training.low_precision import LowPrecision, fast_dtype
from models.demo_training.model import build_model
from models.demo_training.optimizer import MuonAdam
from models.demo_training.progress import Reporter
from models.demo_training.scores import table
from models.demo_training.skills import SKILLS
from models.demo_training.tokenizer import write_tokenizer_folder
from models.demo_training.tutor import Tutor
from models.tiny_tokenizer import write_json

TUTOR_SHARE = 0.4  # of the lessons on patches and tokens, beside the loss on answers
FINAL_RATE = 0.01  # of the peak, at the end of the run
HEADS_RATE = 0.006  # of new heads that learn before all else
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """One run. What stands above `device` must stay the same when it goes on."""

    out: Path
    seed: int = 0
    model: str = "demo"  # or "mini"
    samples: int = 0  # length of the run; or
    minutes: float = 0.0  # of training over all calls
    samples_per_step: int = 48
    learning_rate: float = 0.006  # of Muon; the rest takes half
    warmup_steps: int = 20
    heads_first: int = 0  # steps that teach the heads alone; an export has none, and new ones would mislead
    decay_from: float = 0.7  # share of the run after which the rate falls to nothing
    quantise_from: float = 0.9  # share of the run after which experts train as int4
    only: tuple[str, ...] = ()
    stage: str = ""  # "seeing" (tower and resampler alone), "finding" or "main"; empty for the default
    max_tokens: int = 4096  # of a micro-batch
    max_patches: int = 6144
    dtype: str = ""  # to compute with, empty for what is fast; weights and moments are fp32
    init_from: str = ""  # when the run is new: weights.safetensors of another one, or an exported folder
    device: str = "cpu"
    threads: int = 0  # of PyTorch; 0 for its own choice
    workers: int = 1
    helpers: int = 0  # further processes that compute gradients; see helper.py
    stop_after: float = 0.0  # minutes of this call
    save_every: float = 3.0  # minutes
    evaluate_every: float = 10.0  # minutes; 0 for never
    evaluation_samples: int = 16  # per skill
    report_every: float = 10.0  # seconds


class Trainer:
    """Model, optimizer and how far they are; `run` goes on until the run is over or the call's time is up."""

    def __init__(self, settings: Settings, is_helper: bool = False) -> None:
        self.settings = settings
        self.device = torch.device(settings.device)
        sizes = {"demo": demo_model, "mini": mini_model}[settings.model]()
        self.model = build_model(sizes, settings.seed, settings.device)
        dtype = DTYPES[settings.dtype] if settings.dtype else fast_dtype(self.device)
        self.computing = LowPrecision(self.model, dtype)
        self.optimizer = MuonAdam(checkpoint.trained_parameters(self.model), settings.learning_rate)
        self.balancer = LoadBalancer(self.model, self.computing.copy)
        self.tutor = Tutor(self.computing.copy)
        self.normalise = Normaliser(self.device)
        self.progress = Progress(settings.seed)
        self._folder = settings.out / "checkpoint"
        self._tokenizer = settings.out / "tokenizer"
        if not self._tokenizer.exists():
            self._make_tokenizer(Path(settings.init_from) if settings.init_from else None)
        self._go_on()
        self.reporter = Reporter(settings.out / "log.jsonl", settings.report_every)
        count = 0 if is_helper else settings.helpers
        self.helpers = Helpers(count, sys.argv[1:], self.model.parameters())

    def run(self) -> None:
        try:
            self._run()
        finally:
            self.helpers.close()
        if self.reporter.has_news:
            self._report()
        self.save()

    def _run(self) -> None:
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

    @property
    def feed_settings(self) -> FeedSettings:
        s = self.settings
        return FeedSettings(
            self._tokenizer, s.seed, s.samples_per_step, s.max_tokens, s.max_patches, s.only, s.stage
        )

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
        num_answers = self.gradients(batches)
        self.progress.answers += self.helpers.add_to(num_answers)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.balancer.update()
        self.progress.step += 1
        self.progress.samples += self.settings.samples_per_step
        self.helpers.publish(self.progress)

    def gradients(self, batches: list[MicroBatch]) -> int:
        """Leaves the mean over all answers in the parameters; returns how many answers there are."""
        self._refresh()
        self.tutor.only_heads = self.progress.step < self.settings.heads_first
        num_answers = sum(len(batch.skills) for batch in batches)
        if self.settings.stage == "seeing":
            num_patches = sum(len(batch.patches) for batch in batches)
            for batch in batches:
                self._backward_seeing(batch, num_patches)
            return num_answers
        pending = [self._backward(batch, num_answers) for batch in batches]
        for batch, losses, exact in pending:  # read only now: every read waits for the device
            self.reporter.add(batch.skills.tolist(), losses.tolist(), exact.tolist())
        return num_answers

    def _backward(self, batch: MicroBatch, num_answers: int) -> tuple[MicroBatch, torch.Tensor, torch.Tensor]:
        """An answer weighs by the square root of its length: neither digits nor tool calls drown."""
        moved = to_device(batch, self.device)
        sums, counts, exact = answer_losses(
            self.computing.copy, self.normalise, moved, self.tutor.keep_attention
        )
        loss = (sums / counts.sqrt()).sum().div(num_answers)
        if moved.media is not None:
            seeing = self._seeing_loss(moved.media) + self._decoder_loss(
                batch, moved.media, moved.packing.source
            )
            share = TUTOR_SHARE * len(batch.skills) / num_answers
            loss = share * seeing if self.tutor.only_heads else loss + share * seeing
        if moved.media is not None or not self.tutor.only_heads:
            loss.backward()
        self.computing.collect()
        return batch, (sums / counts).detach(), exact

    def _backward_seeing(self, batch: MicroBatch, num_patches: int) -> None:
        """Tower and resampler alone: a picture costs a fifth of what it costs with the decoder."""
        media = media_to_device(batch, self.device)
        media_features(self.computing.copy, self.normalise, media)
        loss = self._seeing_loss(media) * len(batch.patches) / num_patches
        loss.backward()
        self.computing.collect()

    def _seeing_loss(self, media: DeviceMedia) -> torch.Tensor:
        seeing = self.tutor.seeing_loss(media.labels, media.back, media.grids)
        self.reporter.add_seeing(seeing)
        return seeing

    def _decoder_loss(self, batch: MicroBatch, media: DeviceMedia, source: torch.Tensor) -> torch.Tensor:
        is_media = batch.token_ids == demo_model().media.patch
        return self.tutor.decoder_loss(media.labels, media.back, media.grids, is_media, batch.sought, source)

    def _refresh(self) -> None:
        """Late in the run experts compute as int4, with the groups of one rank and of eight in turn."""
        if self.done < self.settings.quantise_from:
            self.computing.refresh()
            return
        with quantised(self.model, "wint4", ranks=8 if self.progress.step % 2 else 1):
            self.computing.refresh()

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
            {"share of the busiest expert": max(shares, default=0.0), "seen": self.tutor.scores()},
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
            self._start_from(Path(self.settings.init_from))

    def _make_tokenizer(self, source: Path | None) -> None:
        """That of the weights to start from; else a new one."""
        if source is None:
            write_tokenizer_folder(self._tokenizer)
        elif source.is_dir():
            own = ("config.json", "generation_config.json", "model.safetensors", "README.md")
            shutil.copytree(source, self._tokenizer, ignore=shutil.ignore_patterns(*own))
        else:
            shutil.copytree(source.parents[1] / "tokenizer", self._tokenizer)
        write_json(self._tokenizer / "preprocessor_config.json", preprocessor_config())

    def _start_from(self, source: Path) -> None:
        """Weights of another run, or the bf16 ones of an export."""
        if source.is_dir():
            sizes = {"demo": demo_model, "mini": mini_model}[self.settings.model]()
            checkpoint.put_weights(self.model, from_paddle(load_file(source / "model.safetensors"), sizes))
        else:
            checkpoint.load_weights(self.model, source)

    def _time_is_up(self, began: float) -> bool:
        limit = 60 * self.settings.stop_after
        return bool(limit) and time.monotonic() - began >= limit


def learning_rate(settings: Settings, step: int, done: float) -> float:
    """That of new heads first; then a linear warm-up by steps, level, and a straight fall."""
    if step < settings.heads_first:
        return HEADS_RATE
    warm = min(1.0, (step - settings.heads_first + 1) / max(1, settings.warmup_steps))
    left = min(1.0, (1 - done) / max(1e-9, 1 - settings.decay_from))
    return settings.learning_rate * warm * max(FINAL_RATE, left)


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
    parser.add_argument(
        "--stage", choices=("", "seeing", "finding", "main"), default="", help="the one of the whole run"
    )
    parser.add_argument("--dtype", choices=("", *DTYPES), default="", help="empty for what is fast here")
    for name in ("device", "init_from"):
        parser.add_argument(_flag(name), default=getattr(default, name))
    for name in ("seed", "samples", "samples_per_step", "warmup_steps", "heads_first", "max_tokens",
                 "max_patches", "evaluation_samples", "threads", "helpers"):  # fmt: skip
        parser.add_argument(_flag(name), type=int, default=getattr(default, name))
    for name in ("minutes", "learning_rate", "decay_from", "quantise_from", "stop_after", "save_every",
                 "evaluate_every", "report_every"):  # fmt: skip
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
    if settings.threads:
        torch.set_num_threads(settings.threads)
    trainer = Trainer(settings)
    if trainer.is_done:
        print(f"{settings.out} is finished; evaluate or export it, or give a new --out.")
        return
    trainer.run()


if __name__ == "__main__":
    main()

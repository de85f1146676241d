"""How fast a machine draws samples and trains on them.

    python -m models.demo_training.speed [--device cuda] [--feed] [--samples-per-step 64]

Method: one step to warm up, then steps for --seconds. Drawing is timed in one process, without pipes. The
process's own time is given too, because the wall clock of a shared machine says little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from models.demo_training.encode import Encoder
from models.demo_training.feed import FeedSettings, make_step
from models.demo_training.tokenizer import write_tokenizer_folder
from models.demo_training.train import Settings, Trainer


def measure(
    what: str,
    step: Callable[[], object],
    samples: int,
    seconds: float,
    settle: Callable[[], None] | None = None,
) -> None:
    settle = settle or (lambda: None)
    step()
    settle()
    wall, cpu, steps = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < seconds:
        step()
        settle()
        steps += 1
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    count = steps * samples
    print(f"{what}: {count / wall:.1f} samples/s, {count / cpu:.1f} samples per processor second")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.demo_training.speed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--feed", action="store_true", help="only drawing and encoding")
    parser.add_argument("--samples-per-step", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32768, help="of a micro-batch")
    parser.add_argument("--max-patches", type=int, default=65536, help="of a micro-batch")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    samples = options.samples_per_step
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer_folder(folder / "tokenizer", samples_per_skill=100)
        feed = FeedSettings(folder / "tokenizer", 0, samples, options.max_tokens, options.max_patches)
        encoder = Encoder(folder / "tokenizer")
        numbers = iter(range(10**6, 10**9))  # behind the first stages of the curriculum
        if options.feed:
            measure("drawing", lambda: make_step(feed, encoder, next(numbers)), samples, options.seconds)
            return
        trainer = Trainer(Settings(folder, samples=10**9, samples_per_step=samples, device=options.device))
        steps = [make_step(feed, encoder, next(numbers)) for _ in range(2)]
        turn = iter(range(10**9))
        settle = torch.cuda.synchronize if options.device == "cuda" else None
        measure("training", lambda: trainer.step(steps[next(turn) % 2]), samples, options.seconds, settle)
        if options.device == "cuda":
            print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()

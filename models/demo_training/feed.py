"""Draws and encodes training samples in processes of their own, ahead of the trainer.

`Feed` starts them and hands out steps in order; `python -m models.demo_training.feed` is one of them.
Worker w of W makes the steps w, w + W, ...; a step's samples depend on (seed, step) alone, so the number of
workers changes nothing. They write to a pipe: for every micro-batch its length (8 bytes) and its
safetensors bytes; length 0 ends a step.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from models.demo_training.collate import MicroBatch, by_length, collate
from models.demo_training.curriculum import SOURCES, shares_at
from models.demo_training.encode import Encoder
from models.demo_training.sample import Sample, rng_for

STEPS_AHEAD = 4  # per worker, decoded and waiting in the trainer


@dataclass(frozen=True)
class FeedSettings:
    """What decides the samples, and how they are cut into micro-batches."""

    folder: Path  # with the tokenizer
    seed: int
    samples_per_step: int
    max_tokens: int  # of a micro-batch, padding included
    max_patches: int
    only: tuple[str, ...] = ()  # skills; empty for all
    stage: str = ""  # the one of the whole run; empty for the curriculum's, step by step


def draw_step(settings: FeedSettings, step: int) -> list[Sample]:
    """The samples of a step. Sample i of the run draws its skill, then itself, from its own seeds."""
    first = step * settings.samples_per_step
    shares = shares_at(step, settings.only, settings.stage)
    samples = []
    for index in range(first, first + settings.samples_per_step):
        chooser = rng_for("training", settings.seed, "choice of skill", index)
        (skill,) = chooser.choices(list(shares), weights=list(shares.values()))
        samples.append(SOURCES[skill](rng_for("training", settings.seed, skill, index)))
    return samples


def make_step(settings: FeedSettings, encoder: Encoder, step: int) -> list[MicroBatch]:
    examples = [encoder.encode(sample) for sample in draw_step(settings, step)]
    return [collate(group) for group in by_length(examples, settings.max_tokens, settings.max_patches)]


class Feed:
    """Steps in order, from `first_step` on, without end. Close it, or use it in a `with`."""

    def __init__(self, settings: FeedSettings, workers: int, first_step: int = 0) -> None:
        self._processes = [
            subprocess.Popen(
                _command(settings, first_step + w, workers), stdout=subprocess.PIPE, env=_quiet_env()
            )
            for w in range(workers)
        ]
        self._queues: list[queue.Queue[list[MicroBatch] | None]] = [
            queue.Queue(STEPS_AHEAD) for _ in range(workers)
        ]
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._read, args=(process.stdout, steps), daemon=True)
            for process, steps in zip(self._processes, self._queues, strict=True)
        ]
        for process, thread in zip(self._processes, self._threads, strict=True):
            _widen(process.stdout)
            thread.start()
        self._turn = 0

    def next_step(self) -> list[MicroBatch]:
        """Waits for it. Raises RuntimeError when its worker has died."""
        step = self._queues[self._turn].get()
        if step is None:
            raise RuntimeError(f"The sample worker {self._turn} has died; its message is above.")
        self._turn = (self._turn + 1) % len(self._queues)
        return step

    def close(self) -> None:
        self._closed.set()
        for process in self._processes:
            process.kill()
        for thread, steps in zip(self._threads, self._queues, strict=True):
            while thread.is_alive():
                _drain(steps)
                thread.join(0.05)
        for process in self._processes:
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, pipe: IO[bytes], steps: queue.Queue[list[MicroBatch] | None]) -> None:
        try:
            for step in _read_steps(pipe):
                if self._closed.is_set():
                    return
                steps.put(step)
        finally:
            steps.put(None)


def _widen(pipe: IO[bytes] | None) -> None:
    """Let a worker write a megabyte before it waits; a step is several. Only Linux can."""
    if pipe is not None and hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)


def _drain(steps: queue.Queue[list[MicroBatch] | None]) -> None:
    while not steps.empty():
        steps.get_nowait()


def _read_steps(pipe: IO[bytes]) -> Iterator[list[MicroBatch]]:
    """Until the pipe ends."""
    step: list[MicroBatch] = []
    while len(header := pipe.read(8)) == 8:
        size = int.from_bytes(header, "little")
        if size == 0:
            yield step
            step = []
            continue
        data = pipe.read(size)
        if len(data) < size:
            return
        step.append(MicroBatch.from_bytes(data))


def write_step(pipe: IO[bytes], step: list[MicroBatch]) -> None:
    for batch in step:
        data = batch.to_bytes()
        pipe.write(len(data).to_bytes(8, "little"))
        pipe.write(data)
    pipe.write(bytes(8))
    pipe.flush()


def _quiet_env() -> dict[str, str]:
    """One thread per worker: there are as many workers as cores to spare."""
    root = str(Path(__file__).resolve().parents[2])
    return os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": root}


def _command(settings: FeedSettings, first_step: int, stride: int) -> list[str]:
    options = [f"--{name.replace('_', '-')}={_spell(value)}" for name, value in asdict(settings).items()]
    module = [sys.executable, "-m", "models.demo_training.feed"]
    return [*module, *options, f"--first-step={first_step}", f"--stride={stride}"]


def _spell(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.demo_training.feed")
    parser.add_argument("--folder", type=Path, required=True)
    for name in ("seed", "samples-per-step", "max-tokens", "max-patches", "first-step", "stride"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--stage", default="")
    options = vars(parser.parse_args())
    step, stride = options.pop("first_step"), options.pop("stride")
    options["only"] = tuple(filter(None, options["only"].split(",")))
    settings = FeedSettings(**options)
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the bytes
    encoder = Encoder(settings.folder)
    try:
        while True:
            write_step(pipe, make_step(settings, encoder, step))
            step += stride
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(0)  # the trainer has gone: nothing is left to flush


if __name__ == "__main__":
    main()

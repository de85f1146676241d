"""A second process that computes gradients while the trainer does, for a core that is often idle.

It reads the trainer's weights from shared memory, and leaves there the gradient of samples of its own. The
trainer adds what it finds, which is old by a step or two. What that is depends on the clock, so a run with
helpers cannot be repeated bit by bit. `Helpers` starts them; `python -m models.demo_training.helper` is one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from models.demo_training.checkpoint import Progress
from models.demo_training.curriculum import shares_at
from models.demo_training.feed import Feed

if TYPE_CHECKING:
    from models.demo_training.train import Trainer

NICE = 19
SEED_OFFSET = 1000  # of the n-th helper's samples
_POLL_SECONDS = 0.02
_HEADER = 64  # bytes, int64: the trainer's step + 1, answers behind the gradient or 0, samples, milliseconds


class Board:
    """Shared memory: a header, the trainer's weights, one helper's gradient; float32 in a fixed order."""

    def __init__(self, file: Path, parameters: Iterable[torch.nn.Parameter], create: bool = False) -> None:
        self._parameters = list(parameters)
        size = sum(p.numel() for p in self._parameters)
        if create:
            file.write_bytes(b"")
            os.truncate(file, _HEADER + 8 * size)
        whole = np.memmap(file, np.uint8, "r+")
        self.header = whole[:_HEADER].view(np.int64)
        values = torch.from_numpy(whole[_HEADER:].view(np.float32))
        self.weights, self.gradient = values[:size], values[size:]

    @torch.no_grad()
    def publish(self, progress: Progress) -> None:
        """Trainer: put the weights there."""
        torch.cat([p.detach().reshape(-1) for p in self._parameters], out=self.weights)
        self.header[2:4] = progress.samples, int(1000 * progress.seconds)
        self.header[0] = progress.step + 1

    @torch.no_grad()
    def adopt(self, progress: Progress) -> None:
        """Helper: take them. One that is written meanwhile is half new, which does no harm."""
        progress.step, progress.samples = int(self.header[0]) - 1, int(self.header[2])
        progress.seconds = int(self.header[3]) / 1000
        for parameter, part in zip(self._parameters, self._split(self.weights), strict=True):
            parameter.copy_(part.view_as(parameter))

    @torch.no_grad()
    def offer(self, num_answers: int, is_over: Callable[[], bool] = lambda: False) -> None:
        """Helper: put the parameters' gradients there, once the last ones are taken or all is over."""
        while self.header[1] and not is_over():
            time.sleep(_POLL_SECONDS)
        for parameter, part in zip(self._parameters, self._split(self.gradient), strict=True):
            part.zero_() if parameter.grad is None else part.copy_(parameter.grad.reshape(-1))
        self.header[1] = num_answers

    @torch.no_grad()
    def add_to(self, num_answers: int) -> int:
        """Trainer: mix what is there into gradients that are means over `num_answers`; the sum of both."""
        offered = int(self.header[1])
        if not offered:
            return num_answers
        share = offered / (num_answers + offered)
        for parameter, part in zip(self._parameters, self._split(self.gradient), strict=True):
            if parameter.grad is not None:
                parameter.grad.lerp_(part.view_as(parameter), share)
        self.header[1] = 0
        return num_answers + offered

    def _split(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return values.split([p.numel() for p in self._parameters])


class Helpers:
    """The trainer's side: starts them and shares weights and gradients with each."""

    def __init__(self, count: int, arguments: list[str], parameters: Iterable[torch.nn.Parameter]) -> None:
        memory = Path("/dev/shm")
        self._folder = tempfile.mkdtemp(dir=memory if memory.is_dir() else None) if count else ""
        parameters = list(parameters)
        self._boards, self._processes = [], []
        for number in range(count):
            file = Path(self._folder) / str(number)
            self._boards.append(Board(file, parameters, create=True))
            module = [sys.executable, "-m", "models.demo_training.helper"]
            command = [*module, str(file), str(number), str(os.getpid()), *arguments]
            self._processes.append(subprocess.Popen(command, start_new_session=True))

    def publish(self, progress: Progress) -> None:
        for board in self._boards:
            board.publish(progress)

    def add_to(self, num_answers: int) -> int:
        for board in self._boards:
            num_answers = board.add_to(num_answers)
        return num_answers

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.wait()
        if self._folder:
            shutil.rmtree(self._folder)


def help_out(trainer: Trainer, board: Board, number: int, parent: int) -> None:
    """Until process `parent` is gone. Samples follow its stage of the curriculum, not its number of steps."""
    settings = replace(trainer.feed_settings, seed=trainer.settings.seed + SEED_OFFSET * (number + 1))
    feed, shares = None, None

    def is_over() -> bool:
        return os.getppid() != parent

    while not is_over():
        if not board.header[0]:
            time.sleep(_POLL_SECONDS)
            continue
        board.adopt(trainer.progress)
        wanted = shares_at(trainer.progress.step, settings.only, settings.stage)
        if feed is None or shares != wanted:
            shares = wanted
            if feed is not None:
                feed.close()
            feed = Feed(settings, 1, trainer.progress.step)
        board.offer(trainer.gradients(feed.next_step()), is_over)
        trainer.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    from models.demo_training.train import Trainer, parse

    parser = argparse.ArgumentParser(prog="python -m models.demo_training.helper")
    parser.add_argument("board", type=Path)
    parser.add_argument("number", type=int)
    parser.add_argument("parent", type=int, help="the trainer's process id")
    options, rest = parser.parse_known_args()
    os.nice(NICE)
    torch.set_num_threads(1)
    trainer = Trainer(parse(rest), is_helper=True)
    help_out(trainer, Board(options.board, trainer.model.parameters()), options.number, options.parent)
    shutil.rmtree(options.board.parent, ignore_errors=True)  # a trainer that was cut off cannot


if __name__ == "__main__":
    main()

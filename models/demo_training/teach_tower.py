"""Teaches the tower alone what each patch of a picture shows; the first stage of a run, and worth repeating.

    python -m models.demo_training.teach_tower RUN --minutes 6 [--device cuda]

A picture costs a fifth of what it costs with the decoder, and every patch has a label. The checkpoint in RUN
is made if there is none, and replaced; train.py goes on from it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.demo_training.encode import Grid, cut_picture
from models.demo_training.fast_vision import plan_vision, see
from models.demo_training.regions import patch_labels
from models.demo_training.sample import rng_for
from models.demo_training.skills import FIRST_LOOKS, LESSONS
from models.demo_training.train import Settings, Trainer

SOURCES = {
    "small scene": 4,
    "small crowd": 2,
    "first digit": 2,
    "small number": 5,
    "small word": 3,
    "lines": 6,
}
PICTURES_PER_STEP = 48
WARM_UP = 20  # steps
DECAY_FROM = 0.6  # share of the time after which the rate falls


def draw(seed: int, step: int) -> tuple[np.ndarray, np.ndarray, list[Grid]]:
    """Patches [P, 588], their labels [P, 2] and the grids of the pictures of a step."""
    patches, labels, grids = [], [], []
    for index in range(step * PICTURES_PER_STEP, (step + 1) * PICTURES_PER_STEP):
        rng = rng_for("training", seed, "tower", index)
        (name,) = rng.choices(list(SOURCES), weights=list(SOURCES.values()))
        image = (LESSONS | FIRST_LOOKS)[name](rng).media[0]
        assert isinstance(image, Image.Image)
        cut, grid = cut_picture(image)
        patches.append(cut)
        labels.append(patch_labels(image, *grid[1:]))
        grids.append(grid)
    return np.concatenate(patches), np.concatenate(labels), grids


def teach(trainer: Trainer, minutes: float, seed: int) -> None:
    """Prints the loss every half minute; random guessing costs about 9."""
    began = told = time.monotonic()
    losses: list[float] = []
    step, done = 0, 0.0
    while done < 1.0:
        rate = min((step + 1) / WARM_UP, 1.0, (1 - done) / (1 - DECAY_FROM))
        losses.append(teach_step(trainer, rate, seed, step))
        step += 1
        done = (time.monotonic() - began) / (60 * minutes)
        if time.monotonic() - told > 30 or done >= 1.0:
            mean = sum(losses) / len(losses)
            print(f"step {step}  {100 * min(1.0, done):.0f} %  loss {mean:.3f}", flush=True)
            told, losses = time.monotonic(), []


def teach_step(trainer: Trainer, rate: float, seed: int, step: int) -> float:
    patches, labels, grids = draw(seed, step)
    plan, device = plan_vision(grids), trainer.device
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate * trainer.settings.learning_rate
    trainer.computing.refresh()
    tower = trainer.computing.copy.model.vision_tower
    pixels = trainer.normalise(torch.as_tensor(patches[plan.order]).to(device))
    coordinates = torch.as_tensor(plan.coordinates).to(device)
    see(tower, pixels.to(tower.patch_embed.proj.weight.dtype), coordinates, torch.from_numpy(plan.bounds))
    loss = trainer.tutor.loss(torch.as_tensor(labels[plan.order]).to(device))
    loss.backward()
    trainer.computing.collect()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.demo_training.teach_tower")
    parser.add_argument("run", type=Path)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0, help="another one when it is repeated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.run.mkdir(parents=True, exist_ok=True)
    settings = Settings(options.run, learning_rate=options.learning_rate, minutes=1, device=options.device)
    trainer = Trainer(settings)
    teach(trainer, options.minutes, options.seed)
    trainer.save()


if __name__ == "__main__":
    main()

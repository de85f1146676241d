"""Saves and restores a training run: weights, optimizer moments and progress, as safetensors and JSON.

A checkpoint is one folder, replaced as a whole by a rename, so a run that is cut off leaves the previous one.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from models.demo_training.model import Model
from models.demo_training.tutor import HEADS

_WEIGHTS, _MOMENTS, _PROGRESS = "weights.safetensors", "moments.safetensors", "progress.json"


@dataclass
class Progress:
    """How far a run is; with the seed it says which samples come next."""

    seed: int
    step: int = 0
    samples: int = 0
    answers: int = 0  # drawn, those of helpers included; they bear loss but in the seeing stage
    seconds: float = 0.0  # of training, over all calls


def save(folder: Path, model: Model, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    fresh, old = folder.with_suffix(".new"), folder.with_suffix(".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(named_weights(model), fresh / _WEIGHTS)
    save_file(_moments(model, optimizer), fresh / _MOMENTS)
    (fresh / _PROGRESS).write_text(json.dumps(asdict(progress), indent=2) + "\n")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def restore(folder: Path, model: Model, optimizer: torch.optim.Optimizer) -> Progress:
    """Raises FileNotFoundError when there is no checkpoint; `latest` finds it."""
    load_weights(model, folder / _WEIGHTS)
    moments = load_file(folder / _MOMENTS)
    parameters = trained_parameters(model)
    for key, tensor in moments.items():
        name, part = key.rsplit("/", 1)
        on_device = tensor if part == "step" else tensor.to(parameters[name].device)
        optimizer.state[parameters[name]][part] = on_device
    return Progress(**json.loads((folder / _PROGRESS).read_text()))


def latest(folder: Path) -> Path | None:
    """The checkpoint, or the one before it when the last rename did not happen."""
    for candidate in (folder, folder.with_suffix(".old")):
        if (candidate / _PROGRESS).is_file():
            return candidate
    return None


def trained_parameters(model: Model) -> dict[str, torch.nn.Parameter]:
    """By name, without the head, which is the embedding, and without the biases that the balancer moves."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def named_weights(model: Model) -> dict[str, torch.Tensor]:
    """Every tensor once, on the CPU, including correction biases."""
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }


def load_weights(model: Model, file: Path) -> None:
    """Into the parameters in place. Raises RuntimeError if a name is missing or unknown.

    The heads that only training has may be missing.
    """
    put_weights(model, load_file(file), str(file))


def put_weights(model: Model, weights: dict[str, torch.Tensor], origin: str = "The checkpoint") -> None:
    missing, unknown = model.load_state_dict(weights, strict=False)
    needed = {n for n in missing if n != "lm_head.weight" and n.split(".")[0] not in HEADS}
    if needed or unknown:
        raise RuntimeError(f"{origin} does not fit the model: missing {missing}, unknown {unknown}.")


def _moments(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in trained_parameters(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value.detach().float().cpu().contiguous()
    return tensors

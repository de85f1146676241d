"""Muon for matrices, Adam for the rest: twice as much learnt per sample as with Adam alone.

Muon steps by the orthogonal matrix nearest to the momentum, so every direction of a layer moves at the same
pace, also those whose gradient is small: at the start those that carry the picture. Newton and Schulz's
iteration finds that matrix with products only, which bf16 is good enough for where it is fast.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch

from models.demo_training.low_precision import fast_dtype
from models.demo_training.tutor import HEADS

MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.05  # of matrices, times their rate
ADAM_SHARE = 0.5  # of Muon's rate
_ITERATIONS = 4
_QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at 0; four rounds bring most singular values to 0.7 .. 1.1


class MuonAdam(torch.optim.Optimizer):
    """Parameters by name; experts [E, out, in] are E matrices, a fused qkv is three."""

    def __init__(self, named: dict[str, torch.nn.Parameter], rate: float) -> None:
        matrices = {n: p for n, p in named.items() if is_matrix(n, p)}
        self._parts = {p: 3 if "qkv" in n else 1 for n, p in matrices.items()}
        others = [p for n, p in named.items() if n not in matrices]
        super().__init__([{"params": list(matrices.values())}, {"params": others}], {"lr": rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        matrices, others = self.param_groups
        by_shape: dict[torch.Size, list[tuple[torch.nn.Parameter, torch.Tensor]]] = defaultdict(list)
        for parameter in matrices["params"]:
            if parameter.grad is not None:
                update = self._with_momentum(parameter)
                by_shape[update.shape[1:]].append((parameter, update))
        for shape, updates in by_shape.items():
            stacked = orthogonal(torch.cat([update for _, update in updates]))
            rate = matrices["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
            parts = stacked.split([len(update) for _, update in updates])
            for (parameter, _), part in zip(updates, parts, strict=True):
                parameter.mul_(1 - matrices["lr"] * WEIGHT_DECAY)
                parameter.add_(part.reshape(parameter.shape), alpha=-rate)
        for parameter in others["params"]:
            if parameter.grad is not None:
                self._adam(parameter, ADAM_SHARE * others["lr"])

    def _with_momentum(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """[matrices, out, in], Nesterov's."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        update = parameter.grad.lerp(momentum, MOMENTUM)
        return update.reshape(-1, update.shape[-2] // self._parts[parameter], update.shape[-1])

    def _adam(self, parameter: torch.nn.Parameter, rate: float) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        first, second = ADAM_BETAS
        mean = state["mean"].lerp_(parameter.grad, 1 - first)
        square = state["square"].lerp_(parameter.grad.square(), 1 - second)
        step = float(state["step"])
        scale = (square / (1 - second**step)).sqrt_().add_(1e-10)
        parameter.addcdiv_(mean, scale, value=-rate / (1 - first**step))


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Not norms, biases, embeddings and routers."""
    return parameter.ndim >= 2 and all(part not in name for part in ("embed_tokens", "gate.weight", *HEADS))


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """[n, rows, columns] -> the same shape, all singular values near 1."""
    x = matrices.to(fast_dtype(matrices.device))
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True).to(x.dtype) + 1e-12)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        square = x @ x.transpose(1, 2)
        x = a * x + torch.baddbmm(square, square, square, beta=b, alpha=c) @ x
    return (x.transpose(1, 2) if tall else x).float()

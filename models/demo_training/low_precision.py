"""A copy of the model in bf16 to compute with, while the optimizer moves the fp32 original.

On a CPU with bf16 products a step takes a third of fp32's time. One without makes them some forty times
slower than fp32's (a core of a Zen 3: 1.3 against 51 GFLOP/s), so there the copy is fp32. Routers stay fp32,
as they are served.
"""

from __future__ import annotations

import copy

import torch

from models.demo_training.model import Model


def fast_dtype(device: torch.device) -> torch.dtype:
    """What products are fast in: bf16 on GPUs and CPUs with AVX-512, else fp32."""
    has_bf16 = device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.bfloat16 if has_bf16 else torch.float32


class LowPrecision:
    """`copy` computes; `refresh` brings it up to date, `collect` adds its gradients to the original's."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        self.copy = copy.deepcopy(model).to(dtype)
        self._pairs = []
        computing = dict(self.copy.named_parameters())
        for name, parameter in model.named_parameters():
            if ".gate." in name:
                computing[name].data = computing[name].data.float()
            self._pairs.append((parameter, computing[name]))

    @torch.no_grad()
    def refresh(self) -> None:
        for original, computing in self._pairs:
            computing.copy_(original)

    def collect(self) -> None:
        for original, computing in self._pairs:
            if computing.grad is not None:
                gradient = computing.grad.float()
                original.grad = gradient if original.grad is None else original.grad.add_(gradient)
                computing.grad = None

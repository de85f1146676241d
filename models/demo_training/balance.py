"""Keeps experts equally busy without a loss term: the correction bias follows the load.

After every step an expert with less than its share of tokens gets a little more bias, one with more a
little less. The bias only selects; combination weights stay the router's probabilities (specification 3.5).
"""

from __future__ import annotations

from typing import Any

import torch

from models.demo_training.model import Model

SPEED = 1e-3  # change of bias per step; probabilities are around 1 / experts


class LoadBalancer:
    """Counts what the routers of `computing` select in training; `update` moves the biases of both.

    computing  the model whose forward pass is watched, such as a copy of `model` in another dtype
    """

    def __init__(self, model: Model, computing: Model | None = None, speed: float = SPEED) -> None:
        computing = computing or model
        self._speed = speed
        self._biases = {
            name: [module.moe_statics.e_score_correction_bias for module in modules]
            for name, *modules in _routers(model, computing)
        }
        self._loads = {name: torch.zeros(biases[0].numel()) for name, biases in self._biases.items()}
        self.shares: dict[str, torch.Tensor] = {}  # of tokens per expert in the last step, by router
        for name, _, router in _routers(model, computing):
            router.register_forward_hook(self._counter(name))

    @torch.no_grad()
    def update(self) -> None:
        """Move every bias against its load, then forget the counts."""
        for name, biases in self._biases.items():
            load = self._loads[name].to(biases[0].device)
            if load.sum() > 0:
                moved = biases[0] + self._speed * torch.sign(load.mean() - load)
                for bias in biases:
                    bias.copy_(moved - moved.mean())  # only differences select
                self.shares[name] = load / load.sum()
            self._loads[name] = torch.zeros_like(load)

    def _counter(self, name: str) -> Any:
        def count(
            router: Any, _inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        ) -> None:
            if router.training:
                load = torch.bincount(outputs[2].reshape(-1), minlength=router.num_experts)
                self._loads[name] = self._loads[name].to(load.device) + load

        return count


def _routers(model: Model, computing: Model) -> list[tuple[str, Any, Any]]:
    modules = dict(computing.named_modules())
    return [(n, m, modules[n]) for n, m in model.named_modules() if n.endswith("_moe.gate")]

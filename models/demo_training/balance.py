"""Keeps experts equally busy without a loss term: the correction bias follows the load.

After every step an expert with less than its share of tokens gets a little more bias, one with more a
little less. The bias only selects; combination weights stay the router's probabilities (specification 3.5).
"""

from __future__ import annotations

from typing import Any

import torch

from models.demo_training.forward import DeviceBatch
from models.demo_training.model import Model

SPEED = 1e-3  # change of bias per step; probabilities are around 1 / experts


class LoadBalancer:
    """Counts what routers select, by hooks; `update` moves the biases."""

    def __init__(self, model: Model, speed: float = SPEED) -> None:
        self._speed = speed
        self._routers: list[tuple[str, Any]] = [
            (name, module) for name, module in model.named_modules() if name.endswith("_moe.gate")
        ]
        self._loads = {name: torch.zeros(router.num_experts) for name, router in self._routers}
        self._known: dict[bool, torch.Tensor] = {}
        self.shares: dict[str, torch.Tensor] = {}  # of tokens per expert in the last step, by router
        for name, router in self._routers:
            router.register_forward_hook(self._counter(name, is_vision="vision_moe" in name))

    def watch(self, batch: DeviceBatch) -> None:
        """Call before a forward pass: padding must not count, and each pool sees its own tokens in order."""
        known, vision = batch.is_known.reshape(-1), batch.token_types.reshape(-1).bool()
        self._known = {True: known[vision], False: known[~vision]}

    def update(self) -> None:
        """Move every bias against its load, then forget the counts."""
        for name, router in self._routers:
            load = self._loads[name].to(router.weight.device)
            if load.sum() > 0:
                bias = router.moe_statics.e_score_correction_bias
                bias += self._speed * torch.sign(load.mean() - load)
                bias -= bias.mean()  # only differences select
                self.shares[name] = load / load.sum()
            self._loads[name] = torch.zeros_like(load)

    def _counter(self, name: str, is_vision: bool) -> Any:
        def count(
            router: Any, _inputs: Any, outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        ) -> None:
            selected = outputs[2]
            known = self._known.get(is_vision)
            if not router.training or known is None or len(known) != len(selected):
                return
            weights = known.float().repeat_interleave(selected.shape[1])
            load = torch.bincount(selected.reshape(-1), weights=weights, minlength=router.num_experts)
            self._loads[name] = self._loads[name].to(load.device) + load

        return count

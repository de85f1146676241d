"""Teaches the tower what each patch shows (regions.py), by a head that is not part of the exported model."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from models.demo_training.regions import NUM_COLOURS, NUM_FORMS, UNKNOWN

BACKGROUND_WEIGHT = 0.3  # of all background together, against all else


class Tutor:
    """Keeps what the tower of `model` saw last; `loss` compares it with the labels."""

    def __init__(self, model: Any) -> None:
        self._head = model.patch_head
        self._seen: torch.Tensor | None = None
        model.model.vision_tower.ln.register_forward_hook(self._keep)

    def _keep(self, module: Any, _inputs: Any, output: torch.Tensor) -> None:
        self._seen = output if torch.is_grad_enabled() else None

    def loss(self, labels: torch.Tensor) -> torch.Tensor:
        """labels [P, 2] in the tower's order -> mean over what stands out plus a share of the background."""
        assert self._seen is not None
        logits = self._head(self._seen).float().split((NUM_FORMS, NUM_COLOURS), dim=1)
        self._seen = None
        total = torch.zeros((), device=labels.device)
        for guess, label in zip(logits, labels.long().unbind(1), strict=True):
            known = label != UNKNOWN
            if known.any():
                losses = cross_entropy(guess[known], label[known], reduction="none")
                weights = torch.where(label[known] > 0, 1.0, 0.0)
                weights = weights / weights.sum().clamp(min=1)
                background = (label[known] == 0).float()
                weights = weights + BACKGROUND_WEIGHT * background / background.sum().clamp(min=1)
                total = total + (losses * weights).sum()
        return total

"""Teaches what each patch shows and where (labels.py), by heads that are not part of the exported model.

One head reads the tower's last states, patch by patch; one the resampler's tokens, each of which must still
tell all of its patches: two frames of two times two. Two read the media's tokens halfway through the decoder,
which is the first to know which picture or frame they belong to, and sorts letters by their place in a word.
The fifth reads what an asking token knows, two heads of the middle layer having looked for it (looking.py).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from models.demo_training.fast_vision import pair_frames
from models.demo_training.labels import (
    COLUMNS,
    LETTERS,
    NUM_CLASSES,
    NUM_COLUMNS,
    SEATS,
    UNKNOWN,
    Column,
    letter_labels,
    seat_labels,
)
from models.demo_training.looking import FOUND, Seekers, found_labels, seekers

BACKGROUND_WEIGHT = 0.3  # of all background together, against all else
LOOKING_WEIGHT, FOUND_WEIGHT = 0.5, 2.0  # beside what media tokens are told
PATCHES_PER_TOKEN = 8  # a single picture's count twice
_SEEN = tuple(column for column in COLUMNS if column.known_to != "decoder")
_LOOKING_HEADS = [1, 4]  # the two that looked most before they were taught
_LEAST = 1e-6  # of attention, so that no loss is without bound
HEADS = ("patch_head", "token_head", "seat_head", "letter_head", "found_head")


def looked(attention: torch.Tensor, seeking: Seekers) -> torch.Tensor:
    """[B, heads, L, L] probabilities -> [M, 2] how much of each looking head's is on what is wanted."""
    rows, columns = torch.from_numpy(seeking.rows), torch.from_numpy(seeking.columns)
    of_seekers = attention[rows, :, columns][:, _LOOKING_HEADS].float()
    wanted = torch.from_numpy(seeking.wanted).to(attention.device)
    return (of_seekers * wanted[:, None]).sum(2).clamp(min=_LEAST)


def add_heads(model: Any, patch_width: int, token_width: int) -> None:
    model.patch_head = torch.nn.Linear(patch_width, NUM_CLASSES)
    model.token_head = torch.nn.Linear(token_width, PATCHES_PER_TOKEN * NUM_CLASSES)
    model.seat_head = torch.nn.Linear(token_width, sum(column.num_classes for column in SEATS))
    model.found_head = torch.nn.Linear(token_width, sum(column.num_classes for column in FOUND))
    model.letter_head = torch.nn.Linear(token_width, sum(column.num_classes for column in LETTERS))


class Tutor:
    """Keeps what tower, resampler and decoder of `model` passed on last; the losses compare it with labels.

    A loss is the sum over columns of their weight times the mean over what stands out, plus a share of the
    background.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._kept: dict[str, torch.Tensor] = {}
        self._right: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()
        self._attention: list[torch.Tensor] = []
        self.only_heads = False  # whether the losses teach the heads alone, for a model whose heads are new
        layers = model.model.language_model.layers
        self._middle = len(layers) // 2
        middle = layers[self._middle].self_attn.q_proj
        last = layers[-1].self_attn.q_proj
        last.register_forward_pre_hook(lambda _m, inputs: self._keep("found_head", inputs[0]))
        model.model.vision_tower.ln.register_forward_hook(lambda _m, _i, out: self._keep("patch_head", out))
        model.model.resampler_model.register_forward_hook(lambda _m, _i, out: self._keep("token_head", out))
        middle.register_forward_pre_hook(lambda _m, inputs: self._keep("seat_head", inputs[0]))

    def _keep(self, head: str, states: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            self._kept[head] = states.detach() if self.only_heads else states

    def seeing_loss(self, labels: torch.Tensor, back: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """labels [P, NUM_COLUMNS] in the tower's order, back [P] to prompt order, grids [N, 3] on the CPU."""
        of_tokens = _of_tokens(labels, back, grids).reshape(-1, NUM_COLUMNS)
        of_tower = self._loss("patch_head", self._kept.pop("patch_head"), _SEEN, labels)
        return (of_tower + self._loss("token_head", self._kept.pop("token_head"), _SEEN, of_tokens)) / 2

    def decoder_loss(
        self,
        labels: torch.Tensor,
        back: torch.Tensor,
        grids: torch.Tensor,
        is_media: np.ndarray,
        sought: np.ndarray,
        source: torch.Tensor,
    ) -> torch.Tensor:
        """Of the media's tokens, which come last in the packed decoder, and of those that look for them.

        is_media [B, L] bool; sought [B, L] uint16, see looking.py; source [B * L] packed token of each place
        """
        of_tokens = _of_tokens(labels, back, grids).reshape(-1, PATCHES_PER_TOKEN, NUM_COLUMNS)
        shown = of_tokens.cpu().numpy()
        of_seats = seat_labels(grids.numpy(), is_media.sum(1), shown)
        seats = torch.from_numpy(of_seats).to(labels.device)
        letters = torch.from_numpy(letter_labels(shown)).to(labels.device)
        states = self._kept.pop("seat_head")[-len(shown) :]
        seeking = seekers(sought, is_media, shown)
        found = torch.from_numpy(found_labels(seeking, is_media, shown, of_seats)).to(labels.device)
        return (
            self._loss("seat_head", states, SEATS, seats)
            + self._loss("letter_head", states, LETTERS, letters)
            + self._looking_loss(seeking, found, source.view(is_media.shape))
        )

    def _looking_loss(self, seeking: Seekers, found: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        attention, states = self._attention.pop(), self._kept.pop("found_head")
        if len(seeking.rows) == 0:
            return attention.new_zeros((), dtype=torch.float32)
        shares = looked(attention, seeking)
        self._right["looking"] += int((shares.detach() > 0.5).sum())
        self._asked["looking"] += shares.numel()
        places = source[torch.from_numpy(seeking.rows), torch.from_numpy(seeking.columns)]
        of_found = self._loss("found_head", states[places], FOUND, found)
        return FOUND_WEIGHT * of_found - LOOKING_WEIGHT * shares.log().mean()

    def keep_attention(self, layer: int, attention: torch.Tensor) -> None:
        """Of the middle layer, the first that knows which picture its tokens belong to."""
        if layer == self._middle:
            self._attention = [attention.detach() if self.only_heads else attention]

    def _loss(
        self, head: str, states: torch.Tensor, columns: tuple[Column, ...], labels: torch.Tensor
    ) -> torch.Tensor:
        """labels [R, columns or more]; the head's outputs are R rows of all columns' classes."""
        logits = getattr(self._model, head)(states).float().reshape(len(labels), -1)
        guesses = logits.split([column.num_classes for column in columns], dim=1)
        total = torch.zeros((), device=labels.device)
        for column, guess, label in zip(columns, guesses, labels.unbind(1), strict=False):
            known = (label != UNKNOWN).nonzero().squeeze(1)
            if len(known) == 0 or (head == "patch_head" and column.known_to != "tower"):
                continue
            guess, label = guess[known], label[known].long()
            losses = cross_entropy(guess, label, reduction="none")
            total = total + column.weight * (losses * _weights(label, column.has_background)).sum()
            if head != "patch_head":
                self._score(
                    f"found: {column.name}" if head == "found_head" else column.name, column, guess, label
                )
        return total

    @torch.no_grad()
    def _score(self, name: str, column: Column, guess: torch.Tensor, label: torch.Tensor) -> None:
        stands_out = label > 0 if column.has_background else torch.ones_like(label, dtype=torch.bool)
        self._right[name] += int(((guess.argmax(1) == label) & stands_out).sum())
        self._asked[name] += int(stands_out.sum())

    def scores(self) -> dict[str, float]:
        """Share of right labels of what stands out, as tokens tell it, since the last call."""
        shares = {name: self._right[name] / max(1, asked) for name, asked in self._asked.items()}
        self._right.clear()
        self._asked.clear()
        return shares


def _of_tokens(labels: torch.Tensor, back: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """[P, NUM_COLUMNS] in the tower's order -> [T, 8 * NUM_COLUMNS], the patches of each token."""
    return pair_frames(labels[back].reshape(-1, PATCHES_PER_TOKEN // 2 * NUM_COLUMNS), grids)


def _weights(label: torch.Tensor, has_background: bool) -> torch.Tensor:
    """Of every row; they add up to 1, and to BACKGROUND_WEIGHT over what is background."""
    if not has_background:
        return torch.full(label.shape, 1 / len(label), device=label.device)
    weights = (label > 0).float()
    weights = weights / weights.sum().clamp(min=1)
    background = (label == 0).float()
    return weights + BACKGROUND_WEIGHT * background / background.sum().clamp(min=1)

"""Examples to micro-batches: padded rectangles of similar lengths, and their bytes on a pipe.

A step draws a set of samples; its micro-batches are cut from the set sorted by length, so little is padding
and every step still sees all skills. Padding is at the right, where causal attention never looks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from safetensors.numpy import load, save

from models.demo_training.encode import Example
from models.demo_training.skills import SKILLS

SKILL_NAMES = tuple(SKILLS)


@dataclass(frozen=True)
class MicroBatch:
    """B examples of up to L tokens.

    token_ids    [B, L] int32, 0 behind the end      lengths [B] int32
    answers      [B, L] uint8: 0 bears no loss, k belongs to the row's k-th answer
    branches     [B, L] uint8: 0 is seen by all that follows, k by its own branch only
    sought       [B, L] uint16: what a token is to look for in the media, 0 for nothing
    positions    [3, B, L] int32                     token_types [B, L] uint8
    patches      [P, 588] uint8                      patch_labels [P, NUM_COLUMNS] uint8
    grids [N, 3] int32, all media in order
    skills       [A] int32, of all answers, row by row: indices into SKILL_NAMES
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    answers: np.ndarray
    branches: np.ndarray
    sought: np.ndarray
    positions: np.ndarray
    token_types: np.ndarray
    patches: np.ndarray
    patch_labels: np.ndarray
    grids: np.ndarray
    skills: np.ndarray

    def to_bytes(self) -> bytes:
        return save({f.name: np.ascontiguousarray(getattr(self, f.name)) for f in fields(self)})

    @staticmethod
    def from_bytes(data: bytes) -> MicroBatch:
        return MicroBatch(**load(data))


def collate(examples: list[Example]) -> MicroBatch:
    lengths = np.array([len(e.token_ids) for e in examples], np.int32)
    size = (len(examples), int(lengths.max()))
    token_ids, token_types = np.zeros(size, np.int32), np.zeros(size, np.uint8)
    answers, branches = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    sought, positions = np.zeros(size, np.uint16), np.zeros((3, *size), np.int32)
    for row, e in enumerate(examples):
        token_ids[row, : lengths[row]] = e.token_ids
        token_types[row, : lengths[row]] = e.token_types
        answers[row, : lengths[row]] = e.answers
        branches[row, : lengths[row]] = e.branches
        sought[row, : lengths[row]] = e.sought
        positions[:, row, : lengths[row]] = e.positions
    return MicroBatch(
        token_ids,
        lengths,
        answers,
        branches,
        sought,
        positions,
        token_types,
        np.concatenate([e.patches for e in examples]),
        np.concatenate([e.patch_labels for e in examples]),
        np.array([g for e in examples for g in e.grids], np.int32).reshape(-1, 3),
        np.array([SKILL_NAMES.index(skill) for e in examples for skill in e.skills], np.int32),
    )


def by_length(examples: list[Example], max_tokens: int, max_patches: int) -> list[list[Example]]:
    """Groups of similar length, each within both bounds (or of one example)."""
    groups: list[list[Example]] = []
    patches = 0
    for example in sorted(examples, key=lambda e: len(e.token_ids)):
        group = groups[-1] if groups else []
        fits = (len(group) + 1) * len(example.token_ids) <= max_tokens
        if not group or not fits or patches + len(example.patches) > max_patches:
            groups.append([])
            patches = 0
        groups[-1].append(example)
        patches += len(example.patches)
    return groups

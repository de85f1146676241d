"""Prompts for comparing Octet with an implementation that nobody here wrote.

A case is token ids in Octet's convention (one placeholder id for images and videos), uint8 patches in
prompt order and the 3-D position of every token. Positions follow the Paddle rule and are written out
here once more, so that an error in workers/positions.py cannot hide.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from models.tiny import tiny_model

FOLDER = Path(__file__).parent
PRESETS = ("golden", "golden-tied")  # of models/tiny.py
CASES = ("text", "image", "two-images", "video", "image-and-video")
WEIGHT_SEED, CASE_SEED = 7, 11
NUM_GREEDY = 32
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Media:
    kind: Literal["image", "video"]
    grid: Grid  # frames, patch rows, patch columns
    patches: np.ndarray  # [frames * rows * columns, 588] uint8
    offset: int  # index of its first placeholder

    @property
    def num_tokens(self) -> int:
        frames, rows, columns = self.grid
        return max(frames // 2, 1) * (rows // 2) * (columns // 2)


@dataclass(frozen=True)
class Case:
    name: str
    token_ids: np.ndarray  # [S] int32
    positions: np.ndarray  # [3, S] int32: time, row, column
    media: list[Media] = field(default_factory=list)

    @property
    def is_media(self) -> np.ndarray:
        """[S] bool: the placeholders, whose embeddings come from pixels."""
        inside = np.zeros(len(self.token_ids), bool)
        for item in self.media:
            inside[item.offset : item.offset + item.num_tokens] = True
        return inside


@dataclass(frozen=True)
class Ids:
    """Where the media ids of a configuration lie; text ids are below `patch`."""

    patch: int
    image: tuple[int, int]  # start, end
    video: tuple[int, int]


@dataclass(frozen=True)
class Golden:
    """What the reference answered; row r of `logits` belongs to token index `rows[r]`."""

    case: Case
    rows: np.ndarray
    logits: np.ndarray  # [R, V] fp32
    greedy: np.ndarray  # [NUM_GREEDY] ids below the placeholder
    weights_sha256: str


def media_ids(preset: str) -> Ids:
    media = tiny_model(preset).media
    return Ids(media.patch, (media.image_start, media.image_end), (media.video_start, media.video_end))


def make_cases(ids: Ids, seed: int) -> list[Case]:
    """Text, one image, two of different size, a video longer than wide, and an image with a video."""
    rng = np.random.default_rng(seed)
    image, tall, wide = ("image", (1, 4, 6)), ("image", (1, 8, 4)), ("image", (1, 2, 10))
    video, clip = ("video", (8, 4, 6)), ("video", (6, 4, 4))
    parts = ([24], [4, image, 9], [3, image, tall, 8], [5, video, 7], [2, wide, 3, clip, 6])
    return [_make_case(name, part, ids, rng) for name, part in zip(CASES, parts, strict=True)]


def _make_case(name: str, parts: list, ids: Ids, rng: np.random.Generator) -> Case:
    """A number stands for so many text tokens, a (kind, grid) for a media item between its markers."""
    tokens: list[int] = []
    columns: list[np.ndarray] = []
    media: list[Media] = []
    counter = 0
    for part in parts:
        if isinstance(part, int):
            counter = _add_text(rng.integers(3, ids.patch, part).tolist(), counter, tokens, columns)
            continue
        kind, grid = part
        start, end = ids.image if kind == "image" else ids.video
        counter = _add_text([start], counter, tokens, columns)
        patches = rng.integers(0, 256, (grid[0] * grid[1] * grid[2], 588), dtype=np.uint8)
        item = Media(kind, grid, patches, len(tokens))
        tokens += [ids.patch] * item.num_tokens
        steps = np.indices((max(grid[0] // 2, 1), grid[1] // 2, grid[2] // 2)).reshape(3, -1)
        columns.append(counter + steps)
        counter = _add_text([end], counter + int(steps.max()) + 1, tokens, columns)
        media.append(item)
    return Case(name, np.array(tokens, np.int32), np.concatenate(columns, 1).astype(np.int32), media)


def _add_text(new: list[int], counter: int, tokens: list[int], columns: list[np.ndarray]) -> int:
    tokens += new
    columns.append(np.tile(np.arange(counter, counter + len(new)), (3, 1)))
    return counter + len(new)


def save_golden(file: Path, golden: Golden) -> None:
    arrays = {
        "token_ids": golden.case.token_ids,
        "positions": golden.case.positions,
        "grids": np.array([item.grid for item in golden.case.media], np.int32).reshape(-1, 3),
        "kinds": np.array([item.kind for item in golden.case.media], "U5"),
        "offsets": np.array([item.offset for item in golden.case.media], np.int32),
        "rows": golden.rows.astype(np.int32),
        "logits": golden.logits.astype(np.float32),
        "greedy": golden.greedy.astype(np.int32),
        "weights_sha256": np.array(golden.weights_sha256),
    }
    patches = {f"patches_{index}": item.patches for index, item in enumerate(golden.case.media)}
    np.savez_compressed(file, allow_pickle=False, **arrays, **patches)


def load_golden(file: Path) -> Golden:
    with np.load(file, allow_pickle=False) as arrays:
        media = [
            Media(str(kind), tuple(map(int, grid)), arrays[f"patches_{index}"], int(offset))
            for index, (kind, grid, offset) in enumerate(
                zip(arrays["kinds"], arrays["grids"], arrays["offsets"], strict=True)
            )
        ]
        return Golden(
            Case(file.stem, arrays["token_ids"], arrays["positions"], media),
            arrays["rows"],
            arrays["logits"],
            arrays["greedy"],
            str(arrays["weights_sha256"]),
        )

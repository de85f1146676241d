"""From media files to the encoded rows that a batch needs, shared by all ranks.

Media are cut into units (an image, or a short run of a video's frame pairs). A unit is encoded when a chunk
first touches its tokens, by one rank, which then sends the result to the others; it is forgotten once its
tokens are computed. So a long video never lies in memory whole, and encoding keeps pace with prefill.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.errors import EngineError
from engine.messages import Chunk, MediaItem
from engine.model_config import ModelConfig
from workers.device.base import Device, DtypeName, Tensor
from workers.model.decoder import MediaRows
from workers.model.encoder import PatchBatch
from workers.model.ernie_vl import ErnieVl
from workers.positions import token_grid
from workers.sequences import LiveSequence, Sequences

PATCHES_PER_UNIT = 4096  # a video is cut after this many; one frame pair or one image may be larger
PATCHES_PER_CALL = 8192  # small units are packed into one encoder call up to this many


@dataclass(frozen=True, slots=True)
class MediaUnit:
    """Frames [first_frame, first_frame + num_frames) of a media item and the prompt tokens they fill."""

    item: MediaItem
    first_frame: int
    num_frames: int
    start: int  # index of the first token in the sequence
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def num_patches(self) -> int:
        _, rows, columns = self.item.grid
        return self.num_frames * rows * columns


def cut_into_units(item: MediaItem) -> list[MediaUnit]:
    """The item's units in prompt order; frames of a video stay in pairs."""
    frames, rows, columns = item.grid
    pairs, token_rows, token_columns = token_grid(item.grid)
    frames_per_pair = frames // pairs
    tokens_per_pair = token_rows * token_columns
    step = max(PATCHES_PER_UNIT // (frames_per_pair * rows * columns), 1)
    return [
        MediaUnit(
            item=item,
            first_frame=first * frames_per_pair,
            num_frames=min(step, pairs - first) * frames_per_pair,
            start=item.offset + first * tokens_per_pair,
            num_tokens=min(step, pairs - first) * tokens_per_pair,
        )
        for first in range(0, pairs, step)
    ]


def assign_ranks(units: Sequence[MediaUnit], world: int) -> list[int]:
    """Who encodes which unit: each goes to the rank with the fewest patches so far, lowest rank first."""
    load = [0] * world
    owners = []
    for unit in units:
        owner = load.index(min(load))
        load[owner] += unit.num_patches
        owners.append(owner)
    return owners


@dataclass(frozen=True, slots=True)
class _Overlap:
    """Rows [first_row, +num_rows) of a batch are rows [first_feature, +num_rows) of a unit's features."""

    seq_id: int
    unit: MediaUnit
    first_row: int
    first_feature: int
    num_rows: int

    @property
    def key(self) -> tuple[int, int]:
        return self.seq_id, self.unit.start


@dataclass(slots=True)
class EncodeStats:
    seconds: float = 0.0
    num_patches: int = 0


class MediaFeatures:
    """Encoded units of the live sequences, the same on every rank."""

    def __init__(
        self, device: Device, model: ModelConfig, runnable: ErnieVl, dtype: DtypeName, folder: Path
    ) -> None:
        self._device = device
        self._hidden_size = model.hidden_size
        self._patch_features = model.vision.patch_features if model.vision is not None else 0
        self._runnable = runnable
        self._dtype = dtype
        self._folder = folder  # RunDirectory.media
        self._units: dict[int, list[MediaUnit]] = {}  # of each live sequence with media
        self._features: dict[tuple[int, int], Tensor] = {}  # (seq_id, start) -> [num_tokens, H]

    def drop(self, seq_id: int) -> None:
        for unit in self._units.pop(seq_id, ()):
            self._features.pop((seq_id, unit.start), None)

    def rows_for(self, chunks: Sequence[Chunk], sequences: Sequences) -> tuple[list[MediaRows], EncodeStats]:
        """The features that the chunks' tokens need, encoding what is missing.

        Every rank calls this with the same plan. Call `release_computed` after the batch has run.
        """
        touched = list(self._touched(chunks, sequences))
        missing = [overlap for overlap in touched if overlap.key not in self._features]
        stats = self._encode(missing) if missing else EncodeStats()
        return [self._rows(overlap) for overlap in touched], stats

    def release_computed(self, sequence: LiveSequence) -> None:
        """Forget the units whose tokens are all computed."""
        units = self._units.get(sequence.seq_id)
        while units and units[0].end <= sequence.num_computed_tokens:
            self._features.pop((sequence.seq_id, units.pop(0).start), None)

    def _touched(self, chunks: Sequence[Chunk], sequences: Sequences) -> Iterator[_Overlap]:
        """Where chunks and units meet, in batch order."""
        query_start = 0
        for chunk in chunks:
            sequence = sequences[chunk.seq_id]
            begin = sequence.num_computed_tokens
            for unit in self._units_of(sequence):
                low, high = max(unit.start, begin), min(unit.end, begin + chunk.num_tokens)
                if low < high:
                    first_row = query_start + low - begin
                    yield _Overlap(sequence.seq_id, unit, first_row, low - unit.start, high - low)
            query_start += chunk.num_tokens

    def _units_of(self, sequence: LiveSequence) -> list[MediaUnit]:
        """The sequence's units that are not computed yet, cut when it is first seen."""
        if not sequence.media:
            return []
        if sequence.seq_id not in self._units:
            units = [unit for item in sequence.media for unit in cut_into_units(item)]
            self._units[sequence.seq_id] = [u for u in units if u.end > sequence.num_computed_tokens]
        return self._units[sequence.seq_id]

    def _rows(self, overlap: _Overlap) -> MediaRows:
        features = self._features[overlap.key]
        rows = np.arange(overlap.first_row, overlap.first_row + overlap.num_rows, dtype=np.int32)
        return MediaRows(
            features=features[overlap.first_feature : overlap.first_feature + overlap.num_rows],
            rows=self._device.upload(rows),
        )

    # encoding -----------------------------------------------------------------------------------------

    def _encode(self, missing: list[_Overlap]) -> EncodeStats:
        """Encode each unit on one rank and hand the result to all."""
        began = time.perf_counter()
        units = [overlap.unit for overlap in missing]
        owners = assign_ranks(units, self._device.world)
        shares: list[list[_Overlap]] = [[] for _ in range(self._device.world)]
        for overlap, owner in zip(missing, owners, strict=True):
            shares[owner].append(overlap)
        buffers = [self._buffer_for(share) for share in shares]
        mine, my_buffer = shares[self._device.rank], buffers[self._device.rank]
        if mine:
            self._encode_share([overlap.unit for overlap in mine], my_buffer)
            self._runnable.release_encoder_memory()
        for rank, buffer in enumerate(buffers):
            if buffer is not None:
                self._device.broadcast(buffer, rank)
        return EncodeStats(time.perf_counter() - began, sum(unit.num_patches for unit in units))

    def _buffer_for(self, share: list[_Overlap]) -> Tensor | None:
        """One tensor for all features of one rank's share; the units get slices of it."""
        if not share:
            return None
        num_rows = sum(overlap.unit.num_tokens for overlap in share)
        buffer = self._device.empty((num_rows, self._hidden_size), self._dtype)
        start = 0
        for overlap in share:
            self._features[overlap.key] = buffer[start : start + overlap.unit.num_tokens]
            start += overlap.unit.num_tokens
        return buffer

    def _encode_share(self, units: list[MediaUnit], out: Tensor) -> None:
        """Fill `out` with the units' features, a bounded number of patches at a time."""
        start = 0
        for pack in packs(units):
            num_rows = sum(unit.num_tokens for unit in pack)
            patches = np.concatenate([self._read_patches(unit) for unit in pack])
            frames = [unit.item.grid[1:] for unit in pack for _ in range(unit.num_frames)]
            self._runnable.encode(
                PatchBatch(patches, frames),
                [unit.num_frames for unit in pack],
                out[start : start + num_rows],
            )
            start += num_rows

    def _read_patches(self, unit: MediaUnit) -> np.ndarray:
        """The unit's part of the mapped file, [num_patches, 3*14*14] uint8."""
        frames, rows, columns = unit.item.grid
        path = self._folder / unit.item.file
        shape = (frames * rows * columns, self._patch_features)
        try:
            mapped = np.memmap(path, np.uint8, mode="r", shape=shape)
        except (OSError, ValueError) as error:
            raise EngineError(f"cannot map the patches of a {unit.item.kind} at {path}: {error}") from error
        first = unit.first_frame * rows * columns
        return mapped[first : first + unit.num_patches]


def packs(units: Sequence[MediaUnit]) -> Iterator[list[MediaUnit]]:
    """Consecutive units with at most PATCHES_PER_CALL patches together; a larger one comes alone."""
    pack: list[MediaUnit] = []
    num_patches = 0
    for unit in units:
        if pack and num_patches + unit.num_patches > PATCHES_PER_CALL:
            yield pack
            pack, num_patches = [], 0
        pack.append(unit)
        num_patches += unit.num_patches
    if pack:
        yield pack

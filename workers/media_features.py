"""From media files to the encoded rows that a batch needs, shared by all ranks.

Media are cut into units (an image, or a short run of a video's frame pairs). A unit is encoded when a chunk
first touches its tokens: a large one by all ranks together, a small one by one rank, which then sends the
result to the others. Its sequence needs it until its tokens are computed. So a long video never lies in
memory whole, and encoding keeps pace with prefill.
What another sequence needs as well, or left behind lately, is found in image_cache.py instead.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import cuda_ops
from engine.errors import EngineError
from engine.messages import Chunk, MediaItem
from engine.model_config import ModelConfig
from workers.device.base import BYTES_PER_ELEMENT, Device, DtypeName, Tensor
from workers.image_cache import ImageCache, UnitKey
from workers.model.decoder import MediaRows
from workers.model.encoder import PatchBatch
from workers.model.ernie_vl import ErnieVl
from workers.positions import token_grid
from workers.sequences import LiveSequence, Sequences

PATCHES_PER_UNIT = 4096  # a video is cut after this many; one frame pair or one image may be larger
PATCHES_TOGETHER = 1024  # a unit of so many is encoded by all ranks together
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
    def key(self) -> UnitKey:
        """Equal for the same frames of the same content, wherever they stand."""
        return self.item.content_hash, self.first_frame

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
    """Who encodes which unit: the largest first, each goes to the rank with the fewest patches so far."""
    load, owners = [0] * world, [0] * len(units)
    for index in sorted(range(len(units)), key=lambda index: -units[index].num_patches):
        owner = owners[index] = load.index(min(load))
        load[owner] += units[index].num_patches
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
    def use(self) -> tuple[int, int]:
        return self.seq_id, self.unit.start


@dataclass(slots=True)
class EncodeStats:
    seconds: float = 0.0
    num_patches: int = 0  # that went through the encoder
    num_cached_patches: int = 0  # that need not, as their features were there


class MediaFeatures:
    """Encoded units of the live sequences and of those before them, the same on every rank."""

    def __init__(
        self,
        device: Device,
        model: ModelConfig,
        runnable: ErnieVl,
        dtype: DtypeName,
        folder: Path,
        cache_budget: int = 0,
    ) -> None:
        """`cache_budget`: bytes of features that may stay here without a sequence that needs them."""
        self._device = device
        self._hidden_size = model.hidden_size
        self._token_bytes = model.hidden_size * BYTES_PER_ELEMENT[dtype]
        self._patch_features = model.vision.patch_features if model.vision is not None else 0
        self._runnable = runnable
        self._dtype = dtype
        self._folder = folder  # RunDirectory.media
        self._units: dict[int, list[MediaUnit]] = {}  # of each live sequence with media, not yet computed
        self._uses: dict[tuple[int, int], UnitKey] = {}  # (seq_id, start): touched, not yet computed
        self.cache = ImageCache(cache_budget)

    def drop(self, seq_id: int) -> None:
        for unit in self._units.pop(seq_id, ()):
            self._end_use(seq_id, unit)

    def rows_for(self, chunks: Sequence[Chunk], sequences: Sequences) -> tuple[list[MediaRows], EncodeStats]:
        """The features that the chunks' tokens need, encoding what is missing.

        Every rank calls this with the same plan. Call `release_computed` after the batch has run.
        """
        touched = list(self._touched(chunks, sequences))
        stats = self._begin_uses([overlap for overlap in touched if overlap.use not in self._uses])
        return [self._rows(overlap) for overlap in touched], stats

    def release_computed(self, sequence: LiveSequence) -> None:
        """The units whose tokens are all computed are not needed any more."""
        units = self._units.get(sequence.seq_id)
        while units and units[0].end <= sequence.num_computed_tokens:
            self._end_use(sequence.seq_id, units.pop(0))

    def recount(self) -> None:
        """Raise EngineError unless everything held beyond the budget is needed by a live sequence."""
        self.cache.recount(self._uses.values())

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
        features = self.cache[overlap.unit.key]
        rows = np.arange(overlap.first_row, overlap.first_row + overlap.num_rows, dtype=np.int32)
        return MediaRows(
            features=features[overlap.first_feature : overlap.first_feature + overlap.num_rows],
            rows=self._device.upload(rows),
        )

    # uses ---------------------------------------------------------------------------------------------

    def _begin_uses(self, begun: list[_Overlap]) -> EncodeStats:
        """Sequences reach these units for the first time: make their features ready and hold on to them."""
        missing: dict[UnitKey, MediaUnit] = {}
        for overlap in begun:
            key = overlap.unit.key
            if key in self.cache:
                self.cache.take(key)  # at once, or making room for others could forget it
            else:
                missing.setdefault(key, overlap.unit)
        stats = self._encode(list(missing.values())) if missing else EncodeStats()
        for overlap in begun:
            key = self._uses[overlap.use] = overlap.unit.key
            if key in missing:
                self.cache.take(key)
        stats.num_cached_patches = sum(overlap.unit.num_patches for overlap in begun) - stats.num_patches
        return stats

    def _end_use(self, seq_id: int, unit: MediaUnit) -> None:
        if self._uses.pop((seq_id, unit.start), None) is not None:
            self.cache.give_back(unit.key)

    # encoding -----------------------------------------------------------------------------------------

    def _encode(self, units: list[MediaUnit]) -> EncodeStats:
        """Large units by all ranks together, small ones each on one rank; then all have all of them."""
        began = time.perf_counter()
        self.cache.make_room(sum(self._num_bytes(unit.num_tokens) for unit in units))
        features = [self._device.empty((unit.num_tokens, self._hidden_size), self._dtype) for unit in units]
        together = [self._is_for_all(unit) for unit in units]
        for unit, tensor, by_all in zip(units, features, together, strict=True):
            if by_all:
                self._encode_pack([unit], tensor, together=True)
        self._encode_apart(
            [(u, f) for u, f, by_all in zip(units, features, together, strict=True) if not by_all]
        )
        self._runnable.release_encoder_memory()
        for unit, tensor in zip(units, features, strict=True):
            self.cache.add(
                unit.key, tensor, self._num_bytes(unit.num_tokens), keep=self._is_worth_keeping(unit.item)
            )
        return EncodeStats(time.perf_counter() - began, sum(unit.num_patches for unit in units))

    def _is_for_all(self, unit: MediaUnit) -> bool:
        """Depends on the unit alone, as a GPU may round otherwise when ranks share it (D5)."""
        return self._runnable.can_encode_together and unit.num_patches >= PATCHES_TOGETHER

    def _encode_apart(self, work: list[tuple[MediaUnit, Tensor]]) -> None:
        """Small units, each on one rank."""
        owners = assign_ranks([unit for unit, _ in work], self._device.world)
        mine = [one for one, owner in zip(work, owners, strict=True) if owner == self._device.rank]
        if mine:
            self._encode_share([unit for unit, _ in mine], [tensor for _, tensor in mine])
        for (_, tensor), owner in zip(work, owners, strict=True):
            self._device.broadcast(tensor, owner)

    def _num_bytes(self, num_tokens: int) -> int:
        return num_tokens * self._token_bytes

    def _is_worth_keeping(self, item: MediaItem) -> bool:
        """More than the budget would push out everything, and its own beginning before it is wanted again."""
        return self._num_bytes(item.num_tokens) <= self.cache.budget

    def _encode_share(self, units: list[MediaUnit], features: list[Tensor]) -> None:
        """Fill one rank's `features`, a bounded number of patches at a time."""
        remaining = iter(features)
        # A GPU's framework may multiply a row otherwise beside others, so there each unit goes alone (D5).
        for pack in packs(units, 0 if self._device.is_gpu else PATCHES_PER_CALL):
            outs = [next(remaining) for _ in pack]
            if len(pack) == 1:
                self._encode_pack(pack, outs[0])
                continue
            num_rows = sum(unit.num_tokens for unit in pack)
            merged = self._device.empty((num_rows, self._hidden_size), self._dtype)
            self._encode_pack(pack, merged)
            self._copy_apart(merged, outs)

    def _encode_pack(self, pack: list[MediaUnit], out: Tensor, together: bool = False) -> None:
        patches = np.concatenate([self._read_patches(unit) for unit in pack])
        frames = [unit.item.grid[1:] for unit in pack for _ in range(unit.num_frames)]
        runs = [unit.num_frames for unit in pack]
        self._runnable.encode(PatchBatch(patches, frames), runs, out, together=together)

    def _copy_apart(self, merged: Tensor, outs: list[Tensor]) -> None:
        """Each unit has memory of its own, so that forgetting one frees its bytes."""
        start = 0
        for out in outs:
            num_rows = out.shape[0]
            rows = self._device.upload(np.arange(num_rows, dtype=np.int32))
            cuda_ops.scatter_rows(merged[start : start + num_rows], rows, out)
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


def packs(units: Sequence[MediaUnit], most_patches: int = PATCHES_PER_CALL) -> Iterator[list[MediaUnit]]:
    """Consecutive units with at most `most_patches` patches together; a larger one comes alone."""
    pack: list[MediaUnit] = []
    num_patches = 0
    for unit in units:
        if pack and num_patches + unit.num_patches > most_patches:
            yield pack
            pack, num_patches = [], 0
        pack.append(unit)
        num_patches += unit.num_patches
    if pack:
        yield pack

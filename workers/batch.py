"""From a plan's chunks to the index tensors of one forward pass.

Rows of all tensors follow the plan: chunk after chunk, token after token. Everything is computed for the
whole batch at once with NumPy; only slices are copied per chunk, so an 8K-token prefill costs no Python loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from engine.errors import EngineError
from engine.messages import Chunk
from workers.device.base import Device, Tensor
from workers.positions import token_types
from workers.sequences import LiveSequence


@dataclass(slots=True)
class HostBatch:
    """One step on the host; all arrays int32. M tokens in S chunks, B blocks in the longest table."""

    token_ids: np.ndarray  # [M]
    positions: np.ndarray  # [3, M] t, h, w
    slots: np.ndarray  # [M] where each token's KV goes
    token_types: np.ndarray  # [M] 0 text, 1 vision
    block_tables: np.ndarray  # [S, B]; entries behind a sequence's last block are 0 and never read
    query_starts: np.ndarray  # [S + 1]
    kv_lens: np.ndarray  # [S] tokens of KV including this chunk's
    sample_rows: np.ndarray  # [R] rows whose logits are wanted: last tokens of chunks that sample


_ARRAYS = tuple(field.name for field in fields(HostBatch))


@dataclass(slots=True)
class Batch:
    """The same on the device."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    token_types: Tensor
    block_tables: Tensor
    query_starts: Tensor
    kv_lens: Tensor
    sample_rows: Tensor | None  # None: no chunk samples
    num_tokens: int
    num_samples: int
    num_pairs: int  # of a query and a key, at most: what attention costs
    # On a GPU: pieces of attention's work in sequences of few and of many queries (cuda_ops.attention_tasks).
    attention_tasks: tuple[int, int] = (0, 0)

    @property
    def tensors(self) -> list[Tensor | None]:
        """All of them, in order."""
        return [getattr(self, name) for name in _ARRAYS]

    @classmethod
    def upload(cls, host: HostBatch, device: Device) -> Batch:
        uploaded = device.upload_all([getattr(host, name) for name in _ARRAYS])
        tensors: dict[str, Tensor] = dict(zip(_ARRAYS, uploaded, strict=True))
        if not len(host.sample_rows):
            tensors["sample_rows"] = None
        starts, lens = host.query_starts.tolist(), host.kv_lens.tolist()
        return cls(
            **tensors,
            num_tokens=starts[-1],
            num_samples=len(host.sample_rows),
            num_pairs=sum((b - a) * n for a, b, n in zip(starts, starts[1:], lens, strict=False)),
        )


class BatchBuilder:
    """The batch of each step of a rank; where the same sequences decode on, from that of the step before."""

    def __init__(self, block_size: int, image_patch_id: int, num_pools: int) -> None:
        self._block_size = block_size
        self._image_patch_id = image_patch_id
        self._num_pools = num_pools
        self._last: HostBatch | None = None
        self._live: list[LiveSequence] = []  # its sequences

    def build(self, chunks: Sequence[Chunk], live: list[LiveSequence]) -> HostBatch:
        """As build_batch does."""
        is_decoding = all(chunk.num_tokens == 1 and chunk.samples for chunk in chunks)
        if is_decoding and self._last is not None and self._can_advance(self._last, live):
            batch = self._advance(self._last, live)
        else:
            batch = build_batch(chunks, live, self._block_size, self._image_patch_id, self._num_pools)
        self._last, self._live = batch, live
        return batch

    def _can_advance(self, last: HostBatch, live: list[LiveSequence]) -> bool:
        """Whether each array but the token ids is the last one, or that plus one."""
        return len(live) == len(self._live) and all(
            sequence is before
            and end < len(sequence.tokens)
            and end % self._block_size != 0  # the token goes into the block of the last one
            and end > sequence.positions.num_known  # the last token was a generated one, too: it came alone
            for sequence, before, end in zip(live, self._live, last.kv_lens.tolist(), strict=True)
        )

    def _advance(self, last: HostBatch, live: list[LiveSequence]) -> HostBatch:
        ids = [sequence.tokens.at(sequence.num_computed_tokens) for sequence in live]
        token_ids = np.array(ids, np.int32)
        return HostBatch(
            token_ids=token_ids,
            positions=last.positions + np.int32(1),
            slots=last.slots + np.int32(1),
            token_types=token_types(token_ids, self._image_patch_id, self._num_pools),
            block_tables=last.block_tables,
            query_starts=last.query_starts,
            kv_lens=last.kv_lens + np.int32(1),
            sample_rows=last.sample_rows,
        )


def build_batch(
    chunks: Sequence[Chunk],
    live: Sequence[LiveSequence],
    block_size: int,
    image_patch_id: int,
    num_pools: int,
) -> HostBatch:
    """The arrays of one forward pass over the chunks, of the sequences `live`, one each.

    Raises EngineError when a chunk has no tokens or no blocks for them.
    """
    counts = np.array([chunk.num_tokens for chunk in chunks], np.int32)
    first = np.array([sequence.num_computed_tokens for sequence in live], np.int32)
    query_starts = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum(counts, out=query_starts[1:])
    kv_lens = first + counts
    _check_chunks(live, counts, kv_lens, block_size)

    row, index = np.arange(len(chunks)), first  # of each token: its chunk, and its place in the sequence
    if query_starts[-1] > len(chunks):
        row = np.repeat(row, counts)
        index = np.arange(query_starts[-1], dtype=np.int32) + (first - query_starts[:-1])[row]
    token_ids = np.concatenate(
        [s.tokens.view()[s.num_computed_tokens : end] for s, end in zip(live, kv_lens.tolist(), strict=True)]
    )
    block_tables = _block_tables(live, kv_lens, block_size)
    samples = np.array([chunk.samples for chunk in chunks], bool)
    return HostBatch(
        token_ids=token_ids,
        positions=_positions(live, row, index, query_starts.tolist()),
        slots=block_tables[row, index // block_size] * np.int32(block_size) + index % np.int32(block_size),
        token_types=token_types(token_ids, image_patch_id, num_pools),
        block_tables=block_tables,
        query_starts=query_starts,
        kv_lens=kv_lens,
        sample_rows=query_starts[1:][samples] - 1,
    )


def _check_chunks(
    live: Sequence[LiveSequence], counts: np.ndarray, kv_lens: np.ndarray, block_size: int
) -> None:
    """Catch a plan that would read tokens or write slots which do not exist."""
    for sequence, count, end in zip(live, counts.tolist(), kv_lens.tolist(), strict=True):
        known, room = len(sequence.tokens), len(sequence.block_table) * block_size
        if count <= 0 or end > known or end > room:
            raise EngineError(
                f"the plan computes {count} tokens of sequence {sequence.seq_id} up to {end}, "
                f"but it has {known} tokens and blocks for {room}"
            )


def _block_tables(live: Sequence[LiveSequence], kv_lens: np.ndarray, block_size: int) -> np.ndarray:
    widths = ((kv_lens + block_size - 1) // block_size).tolist()
    tables = np.zeros((len(live), max(widths)), np.int32)
    for row, sequence, width in zip(tables, live, widths, strict=True):
        row[:width] = sequence.block_table.view()[:width]
    return tables


def _positions(
    live: Sequence[LiveSequence], row: np.ndarray, index: np.ndarray, query_starts: list[int]
) -> np.ndarray:
    """[3, M]: generated tokens by their index alone, all at once; prompts by slices of theirs."""
    delta = np.array([sequence.positions.delta for sequence in live], np.int32)
    positions = np.empty((3, len(index)), np.int32)
    positions[:] = index + delta[row]
    for i, sequence in enumerate(live):
        if sequence.num_computed_tokens < sequence.positions.num_known:
            chunk = positions[:, query_starts[i] : query_starts[i + 1]]
            sequence.positions.slice_into(chunk, sequence.num_computed_tokens)
    return positions

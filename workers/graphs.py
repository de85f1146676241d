"""Recorded decode steps: one graph for each of some batch sizes, so that a step is one launch and no Python.

A graph reads its batch from memory of its own, which is filled before each replay. A batch that is smaller
than its graph is padded with rows that write no KV, use no expert and belong to no sequence; since a
row's bits ignore its batch (design D5), a replay gives the bits of the ordinary way. What fits no graph goes
that way: prompts, steps with media, more or longer sequences than graphs were recorded for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cuda_ops.feedback import feed_tokens
from workers.batch import Batch, HostBatch
from workers.device.base import Device, Graph, Tensor
from workers.gpu_memory import StepLimits, decode_tasks
from workers.kv_cache import KvCache
from workers.model.decoder import Decoder

_ALIGNMENT = 64  # int32 elements: where arrays of a batch begin


def graph_sizes(num_sequences: int) -> list[int]:
    """Batch sizes worth a graph: close together where batches are small, the largest of all last."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, num_sequences, 32)]
    return [size for size in sizes if size < num_sequences] + [num_sequences]


class _Layout:
    """Where the arrays of a batch of `size` decoding sequences lie in one array of int32."""

    # What padding rows hold: they write no slot (-1), have no expert (-1), and no sequence's queries.
    _PADDING = {"slots": -1, "token_types": -1, "sources": -1}

    def __init__(self, size: int) -> None:
        self.size = size
        self.shapes: dict[str, tuple[int, ...]] = {
            "token_ids": (size,),
            "positions": (3, size),
            "slots": (size,),
            "token_types": (size,),
            "query_starts": (size + 1,),
            "kv_lens": (size,),
            "sample_rows": (size,),
            "sources": (size,),
        }
        self.starts: dict[str, int] = {}
        self.end = 0
        for name, shape in self.shapes.items():
            self.starts[name] = self.end
            self.end += -(-int(np.prod(shape)) // _ALIGNMENT) * _ALIGNMENT

    def tensors(self, memory: Tensor, device: Device) -> dict[str, Tensor]:
        return {
            name: device.view(memory[start : start + int(np.prod(self.shapes[name]))], self.shapes[name])
            for name, start in self.starts.items()
        }

    def fill(self, flat: np.ndarray, host: HostBatch | None, sources: np.ndarray | None) -> np.ndarray:
        """flat[:end] with the batch, padded; None is a batch of padding alone."""
        flat = flat[: self.end]
        arrays = {name: self._view(flat, name) for name in self.shapes}
        for name, array in arrays.items():
            array[...] = self._PADDING.get(name, 0)
        arrays["sample_rows"][:] = np.arange(self.size)
        if host is None:
            return flat
        count = len(host.kv_lens)
        arrays["query_starts"][:] = count
        for name in ("token_ids", "positions", "slots", "token_types", "kv_lens"):
            arrays[name][..., :count] = getattr(host, name)
        arrays["query_starts"][: count + 1] = host.query_starts
        if sources is not None:
            arrays["sources"][:count] = sources
        return flat

    def _view(self, flat: np.ndarray, name: str) -> np.ndarray:
        start, shape = self.starts[name], self.shapes[name]
        return flat[start : start + int(np.prod(shape))].reshape(shape)


@dataclass(slots=True)
class _Recorded:
    layout: _Layout
    num_tasks: int  # of attention, at most
    graph: Graph
    logits: Tensor | None  # [size, padded vocabulary] on rank 0


class DecodeGraphs:
    """Records at once; then `fits` tells which batches `run` takes."""

    def __init__(
        self,
        device: Device,
        decoder: Decoder,
        kv: KvCache,
        limits: StepLimits,
        samples: Tensor,
        vision_from: int,
        on_progress: Callable[[], None],
    ) -> None:
        """`decoder` has buffers of its own; `samples` [n] int32 are the last step's, on the device."""
        self._device, self._decoder, self._kv = device, decoder, kv
        self._samples, self._vision_from = samples, vision_from
        self._sizes = graph_sizes(limits.num_sequences)
        # Sequences that share a prefix count its tokens twice, so there may be more than there are places.
        self._num_kv_tokens = min(limits.num_sequences * limits.num_sequence_tokens, 2 * kv.num_tokens)
        largest = _Layout(self._sizes[-1])
        self._memory = device.empty((largest.end,), "int32")
        self._flat = np.empty(largest.end, np.int32)
        width = -(-limits.num_sequence_tokens // kv.block_size)
        self._tables = device.zeros((largest.size, width), "int32")
        self._recorded: dict[int, _Recorded] = {}
        for size in reversed(self._sizes):  # the largest first: the others use its buffers
            self._recorded[size] = self._record(size)
            on_progress()

    @property
    def num_graphs(self) -> int:
        return len(self._recorded)

    def fits(self, host: HostBatch) -> bool:
        """Whether every sequence decodes, and a graph is large enough for all of them."""
        count = len(host.kv_lens)
        if not len(host.token_ids) == len(host.sample_rows) == count <= self._sizes[-1]:
            return False
        num_tasks = int(((host.kv_lens + 255) // 256).sum())
        return num_tasks <= self._of(count).num_tasks and host.block_tables.shape[1] <= self._tables.shape[1]

    def run(self, host: HostBatch, sources: np.ndarray | None) -> Tensor | None:
        """Logits of the batch's rows on rank 0, as Decoder.run; `sources` as sample_sources gives them."""
        count = len(host.kv_lens)
        recorded = self._of(count)
        self._write(recorded.layout, host, sources)
        self._device.write_corner(self._tables, host.block_tables)
        recorded.graph.replay()
        return None if recorded.logits is None else recorded.logits[:count]

    def _of(self, count: int) -> _Recorded:
        return self._recorded[self._sizes[bisect_left(self._sizes, count)]]

    def _record(self, size: int) -> _Recorded:
        layout = _Layout(size)
        num_tasks = decode_tasks(size, self._num_kv_tokens)
        tensors = layout.tensors(self._memory, self._device)
        sources = tensors.pop("sources")
        batch = Batch(
            **tensors,
            block_tables=self._tables[:size],
            num_tokens=size,
            num_samples=size,
            num_pairs=self._num_kv_tokens,
            attention_tasks=(num_tasks, 0),
        )
        logits: list[Tensor | None] = []

        def work() -> None:
            feed_tokens(sources, self._samples, self._vision_from, batch.token_ids, batch.token_types)
            logits.append(self._decoder.run(batch, [], self._kv))

        self._write(layout, None, None)
        work()  # takes the memory, and loads kernels that were not used yet
        self._device.synchronize()
        return _Recorded(layout, num_tasks, self._device.capture(work), logits[-1])

    def _write(self, layout: _Layout, host: HostBatch | None, sources: np.ndarray | None) -> None:
        self._device.write(self._memory[: layout.end], layout.fill(self._flat, host, sources))

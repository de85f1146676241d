"""The ops of a step that looks as the last one did, called again without the model's Python (CPU, one rank).

The arrays of two steps of the same shapes are the same tensors (`Device.upload_all`), and so are weights,
caches and scratch buffers: what differs is in them. So the second such step is recorded, and those behind it
only make its calls. A step of other shapes, or with media, makes an end of that.
"""

from __future__ import annotations

from workers.batch import Batch
from workers.device.base import Graph, Tensor
from workers.kv_cache import KvCache
from workers.model.context import Context
from workers.model.decoder import Decoder, MediaRows


class Replay:
    """A decoder whose steps are replayed where that can be."""

    def __init__(self, context: Context, decoder: Decoder) -> None:
        self._context = context
        self._decoder = decoder
        self._last: list[object] = []  # what the last step was given
        self._graph: Graph | None = None
        self._logits: Tensor | None = None

    def run(self, batch: Batch, media: list[MediaRows], kv: KvCache) -> Tensor | None:
        """As Decoder.run does."""
        given: list[object] = [kv, *batch.tensors, *media]  # media are new ones in every step
        if list(map(id, given)) != list(map(id, self._last)):  # which _last keeps alive
            self._last, self._graph, self._logits = given, None, None  # memory that the run may need
            self._logits = self._decoder.run(batch, media, kv)
        elif self._graph is None:
            self._graph = self._context.device.capture(lambda: self._compute(batch, media, kv))
        else:
            self._context.begin_work(self._decoder.flops(batch))
            self._graph.replay()
        return self._logits

    def _compute(self, batch: Batch, media: list[MediaRows], kv: KvCache) -> None:
        self._logits = self._decoder.run(batch, media, kv)

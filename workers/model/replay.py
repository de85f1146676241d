"""The ops of a step that looks as the last one did, called again without the model's Python (CPU, one rank).

The arrays of two steps of the same shapes are the same tensors (`Device.upload_all`), and so are weights,
caches and scratch buffers: what differs is in them. So the second such step is recorded, and those behind it
only make its calls. A step of other shapes, or with media, makes an end of that.
"""

from __future__ import annotations

from workers.batch import Batch
from workers.device.base import Tensor
from workers.kv_cache import KvCache
from workers.model.context import Context
from workers.model.decoder import Decoder, MediaRows
from workers.recording import Recording


class Replay:
    """A decoder whose steps are replayed where that can be."""

    def __init__(self, context: Context, decoder: Decoder) -> None:
        self._context = context
        self._decoder = decoder
        self._recording = Recording(context.device)
        self._logits: Tensor | None = None

    def run(self, batch: Batch, media: list[MediaRows], kv: KvCache) -> Tensor | None:
        """As Decoder.run does."""
        given = [kv, *batch.tensors, *media]  # media are new ones in every step
        if self._recording.is_for(given):
            self._context.begin_work(self._decoder.flops(batch))
        else:
            self._logits = None  # memory that the run may need
        self._recording.run(given, lambda: self._compute(batch, media, kv))
        return self._logits

    def _compute(self, batch: Batch, media: list[MediaRows], kv: KvCache) -> None:
        self._logits = self._decoder.run(batch, media, kv)

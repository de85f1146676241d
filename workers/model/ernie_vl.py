"""The whole model of one rank: a decoder, and for the VL family an encoder and a resampler.

Text models run through the same code without the last two. Which tokens and media to run is decided by
workers/runner.py.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.errors import EngineError
from engine.model_config import ModelConfig
from workers.batch import Batch
from workers.device.base import Device, DtypeName, Tensor
from workers.kv_cache import KvCache
from workers.model.context import Context, no_progress
from workers.model.decoder import Decoder, MediaRows
from workers.model.encoder import Encoder, PatchBatch
from workers.model.replay import Replay
from workers.model.resampler import Resampler
from workers.model.shared_encoder import SharedEncoder, can_share
from workers.model.weights import ModelWeights
from workers.model.workspace import Workspace
from workers.parallel import share_of
from workers.positions import MERGE


class ErnieVl:
    """Runs batches and encodes media with the weights of one rank."""

    def __init__(
        self,
        model: ModelConfig,
        weights: ModelWeights,
        device: Device,
        dtype: DtypeName,
        on_progress: Callable[[float], None] = no_progress,
    ) -> None:
        share = share_of(model, device.rank, device.world)
        self._new_context = lambda: Context(device, model, share, dtype, Workspace(device), on_progress)
        self._weights = weights
        context = self._new_context()
        decoder = Decoder(context, weights.decoder)
        self._decoder = decoder if device.is_gpu or device.world > 1 else Replay(context, decoder)
        self._vision_context = self._new_context()
        self._encoder: Encoder | None = None
        self._shared_encoder: SharedEncoder | None = None
        if model.vision is not None and weights.vision is not None and weights.resampler is not None:
            self._encoder = Encoder(self._vision_context, model.vision, weights.vision)
            if can_share(model.vision, device.world):
                self._shared_encoder = SharedEncoder(self._vision_context, model.vision, weights.vision)
            self._resampler = Resampler(self._vision_context, model.vision, weights.resampler)

    def run(self, batch: Batch, media: list[MediaRows], kv: KvCache) -> Tensor | None:
        """Compute a batch; returns logits as Decoder.run does."""
        return self._decoder.run(batch, media, kv)

    def new_decoder(self) -> Decoder:
        """The same decoder with buffers of its own."""
        return Decoder(self._new_context(), self._weights.decoder)

    @property
    def can_encode_together(self) -> bool:
        """Whether all ranks may share the work on one item."""
        return self._shared_encoder is not None

    def encode(
        self, patches: PatchBatch, frames_per_item: list[int], out: Tensor, *, together: bool = False
    ) -> None:
        """Patches of several media items (or runs of their frames) -> features in item order, out [R, H].

        `frames_per_item` cuts patches.frames into items; 1 means an image. `together`: every rank makes
        this call, and each gets the whole result.
        """
        encoder = self._shared_encoder if together else self._encoder
        if encoder is None:
            raise EngineError("a request with media reached a text model; the api has to refuse it")
        encoded = encoder.run(patches)
        runs, frame = [], 0
        for count in frames_per_item:
            rows, columns = patches.frames[frame]
            runs.append((count, rows * columns // MERGE**2))
            frame += count
        self._resampler.run(encoded, runs, out)

    def release_encoder_memory(self) -> None:
        """Give back the encoder's scratch memory, which a large image makes large."""
        self._vision_context.workspace.clear()

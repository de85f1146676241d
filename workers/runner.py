"""One step of one rank: mirror, media, forward pass, sampling.

Every rank runs the same plan; the only asymmetry is that rank 0 samples and the others learn the tokens
from it. The process around this is worker.py.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from pathlib import Path

from engine.messages import StepPlan, StepResult
from engine.model_config import ModelConfig
from workers.batch import Batch, build_batch
from workers.device.base import Device, DtypeName, Tensor
from workers.kv_cache import KvCache
from workers.kv_canary import KvCanary
from workers.media_features import MediaFeatures
from workers.model.context import no_progress
from workers.model.ernie_vl import ErnieVl
from workers.model.weights import ModelWeights
from workers.parallel import share_of
from workers.sampler import Sampler
from workers.sequences import LiveSequence, SampledToken, Sequences, chunks_of
from workers.swap import SwapSpace


class Runner:
    """The live state of one rank between steps."""

    def __init__(
        self,
        model: ModelConfig,
        weights: ModelWeights,
        device: Device,
        dtype: DtypeName,
        media_folder: Path,
        *,
        num_blocks: int,
        block_size: int,
        num_token_ids: int = 0,
        image_cache: int = 0,
        num_host_blocks: int = 0,
        kv_canary: bool = False,
        vocabulary_file: Path = Path("vocabulary"),
        on_progress: Callable[[float], None] = no_progress,
    ) -> None:
        """Allocates the KV cache.

        num_token_ids   ids the tokenizer knows, 0 for the whole vocabulary
        image_cache     bytes of encoded images that may stay when no sequence needs them
        num_host_blocks places in host memory for KV blocks
        kv_canary       compare cached blocks with what this rank filled them with
        vocabulary_file what token ids write, for sequences with a grammar
        """
        share = share_of(model, device.rank, device.world)
        self._model = model
        self._device = device
        self._block_size = block_size
        self._sequences = Sequences()
        self._kv = KvCache.allocate(device, model, share, dtype, num_blocks, block_size)
        self._swap = SwapSpace(device, self._kv, num_host_blocks)
        self._canary = KvCanary(block_size) if kv_canary else None
        self._runnable = ErnieVl(model, weights, device, dtype, on_progress)
        self._media = MediaFeatures(device, model, self._runnable, dtype, media_folder, image_cache)
        self._sampler = Sampler(
            device, model, share.padded_vocab_size, num_token_ids or model.vocab_size, vocabulary_file
        )

    def run(self, plan: StepPlan) -> StepResult:
        """Apply the plan and compute its chunks; all ranks get the tokens, only rank 0 has logprobs."""
        began = time.perf_counter()
        for seq_id in plan.dropped:
            self._media.drop(seq_id)
        self._sequences.apply(plan)
        if self._canary:
            self._canary.check(plan, self._sequences)
        swapped = self._swap.copy(plan.swap_out, plan.swap_in)
        if not plan.has_work:
            self._device.barrier()
            return StepResult(plan.step)

        chunks = chunks_of(plan)
        host = build_batch(
            chunks, self._sequences, self._block_size, self._model.image_patch_id, self._model.num_pools
        )
        media, encoding = self._media.rows_for(chunks, self._sequences)
        logits = self._runnable.run(Batch.upload(host, self._device), media, self._kv)
        computed = [self._sequences.finish_chunk(chunk) for chunk in chunks]
        if self._canary:
            for sequence, chunk in zip(computed, chunks, strict=True):
                self._canary.note(sequence, chunk.num_tokens)
        for sequence in computed:
            self._media.release_computed(sequence)
        sampled = [s for s, chunk in zip(computed, chunks, strict=True) if chunk.samples]
        tokens = self._sample(logits, sampled) if sampled else []
        return StepResult(
            step=plan.step,
            token_ids=array("i", [token.token_id for token in tokens]).tobytes(),
            logprobs={row: token.logprobs for row, token in enumerate(tokens) if token.logprobs},
            compute_seconds=time.perf_counter() - began - encoding.seconds - swapped.seconds,
            encode_seconds=encoding.seconds,
            num_encoded_patches=encoding.num_patches,
            num_cached_patches=encoding.num_cached_patches,
            num_swapped_blocks=swapped.num_blocks,
            swap_seconds=swapped.seconds,
        )

    def _sample(self, logits: Tensor | None, sampled: list[LiveSequence]) -> list[SampledToken]:
        """Sample on rank 0, tell the others, and append the tokens to the mirror everywhere."""
        device = self._device
        if logits is not None:
            token_ids, tokens = self._sampler.sample(logits, sampled)
            device.broadcast(token_ids, 0)
        else:
            token_ids = device.empty((len(sampled),), "int32")
            device.broadcast(token_ids, 0)
            ids = device.download(token_ids).tolist()
            tokens = [SampledToken(s.seq_id, token_id) for s, token_id in zip(sampled, ids, strict=True)]
        for sequence, token in zip(sampled, tokens, strict=True):
            sequence.tokens.append(token.token_id)
        return tokens

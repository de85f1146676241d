"""One step of one rank: mirror, media, forward pass, sampling.

Every rank runs the same plan; the only asymmetry is that rank 0 samples and the others learn the tokens
from it. On a GPU a step is issued and not waited for, so that the next one can be (running_step.py). The
process around this is worker.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import cuda_ops
from cuda_ops.feedback import feed_tokens
from engine.messages import StepPlan, StepResult
from engine.model_config import ModelConfig
from workers.batch import Batch, BatchBuilder, HostBatch
from workers.device.base import Device, Download, DtypeName, Tensor
from workers.gpu_memory import StepLimits, scratch_bytes
from workers.graphs import DecodeGraphs
from workers.kv_cache import KvCache
from workers.kv_canary import KvCanary
from workers.media_features import MediaFeatures
from workers.model.context import no_progress
from workers.model.decoder import MediaRows
from workers.model.ernie_vl import ErnieVl
from workers.model.weights import ModelWeights
from workers.parallel import share_of
from workers.rehearsal import largest_prefill
from workers.running_step import Details, RunningStep, sample_sources
from workers.sampler import Sampler
from workers.sequences import LiveSequence, Sequences, chunks_of
from workers.swap import SwapSpace

_NO_VISION = 2**31 - 1  # beyond every token id


class _Patience:
    """How long a GPU may be silent: work is queued and not waited for, so the pieces of a step add up."""

    def __init__(self, promise: Callable[[float], None]) -> None:
        self._promise = promise
        self._before = self._now = 0.0  # seconds, of the step before and of this one

    def begin_step(self) -> None:
        self._before, self._now = self._now, 0.0

    def allow(self, seconds: float) -> None:
        self._now += seconds
        self._promise(self._before + self._now)


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
        kv_dtype: DtypeName | None = None,
        num_token_ids: int = 0,
        image_cache: int = 0,
        num_host_blocks: int = 0,
        kv_canary: bool = False,
        vocabulary_file: Path = Path("vocabulary"),
        limits: StepLimits | None = None,
        on_progress: Callable[[float], None] = no_progress,
    ) -> None:
        """Allocates the KV cache, and on a GPU records decode steps.

        kv_dtype        of the KV cache; None for the activations'
        num_token_ids   ids the tokenizer knows, 0 for the whole vocabulary
        image_cache     bytes of encoded images that may stay when no sequence needs them
        num_host_blocks places in host memory for KV blocks
        kv_canary       compare cached blocks with what this rank filled them with
        vocabulary_file what token ids write, for sequences with a grammar
        limits          the largest step there will be; needed on a GPU
        """
        share = self._share = share_of(model, device.rank, device.world)
        if device.is_gpu:
            self._patience = _Patience(on_progress)
            on_progress = self._patience.allow
        self._model = model
        self._device = device
        self._block_size = block_size
        self._sequences = Sequences()
        self._batches = BatchBuilder(block_size, model.image_patch_id, model.num_pools)
        self._kv = KvCache.allocate(device, model, share, kv_dtype or dtype, num_blocks, block_size)
        self._swap = SwapSpace(device, self._kv, num_host_blocks)
        self._canary = KvCanary(block_size) if kv_canary else None
        self._runnable = ErnieVl(model, weights, device, dtype, on_progress)
        self._media = MediaFeatures(device, model, self._runnable, dtype, media_folder, image_cache)
        self._sampler = Sampler(
            device, model, share.padded_vocab_size, num_token_ids or model.vocab_size, vocabulary_file
        )
        self._running: list[RunningStep] = []  # issued, their tokens perhaps unknown; the last two at most
        self._vision_from = model.image_patch_id if model.num_pools > 1 else _NO_VISION
        self._most_samples = limits.num_sequences if limits else 0
        self._samples = device.empty((self._most_samples,), "int32")  # of the last step
        self._graphs: DecodeGraphs | None = None
        if device.is_gpu and limits is not None:
            device.lend_scratch(scratch_bytes(model, share, limits))
            self._rehearse(limits, num_blocks)
            self._graphs = self._record_decodes(limits, on_progress)

    def _rehearse(self, limits: StepLimits, num_blocks: int) -> None:
        """Compute the largest step once, with nobody waiting for it."""
        self._patience.begin_step()
        host = largest_prefill(limits, num_blocks, self._block_size, self._model.num_pools)
        self._forward(host, [], [])
        self._device.synchronize()
        self._patience.begin_step()  # the next step has nothing of it to wait for

    def _record_decodes(
        self, limits: StepLimits, on_progress: Callable[[float], None]
    ) -> DecodeGraphs | None:
        """None where the device is not to record."""
        device = self._device
        if not device.can_record:
            return None
        return DecodeGraphs(
            device,
            self._runnable.new_decoder(),
            self._kv,
            limits,
            self._samples,
            self._vision_from,
            lambda: on_progress(0.0),
        )

    def run(self, plan: StepPlan) -> StepResult:
        """Apply the plan and compute its chunks; all ranks get the tokens, only rank 0 has logprobs."""
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> RunningStep:
        """Apply the plan and issue its work, which a CPU has done when this returns.

        On a GPU the step before may still be running; the one before that is waited for.
        """
        began = time.perf_counter()
        self._settle(all_but=1)
        if self._device.is_gpu:
            self._patience.begin_step()
        for seq_id in plan.dropped:
            self._media.drop(seq_id)
        self._sequences.apply(plan)
        if self._canary:
            self._settle()  # it looks at tokens
            self._canary.check(plan, self._sequences)
        swapped = self._swap.copy(plan.swap_out, plan.swap_in)
        if not plan.has_work:
            self._device.barrier()
            return RunningStep(plan.step, began)

        chunks = chunks_of(plan)
        live = [self._sequences[chunk.seq_id] for chunk in chunks]
        host = self._batches.build(chunks, live)
        media, encoding = self._media.rows_for(chunks, self._sequences)
        logits = self._forward(host, live, media)
        for sequence, chunk in zip(live, chunks, strict=True):
            self._sequences.finish_chunk(chunk)
            if self._canary:
                self._canary.note(sequence, chunk.num_tokens)
            self._media.release_computed(sequence)
        sampled = [sequence for sequence, chunk in zip(live, chunks, strict=True) if chunk.samples]
        step = RunningStep(plan.step, began, encoding=encoding, swapped=swapped)
        if sampled:
            step.expect(sampled, *self._sample(logits, sampled))
        self._running.append(step)
        if not self._device.is_gpu:
            self._settle()
        return step

    def _forward(
        self, host: HostBatch, live: Sequence[LiveSequence], media: list[MediaRows]
    ) -> Tensor | None:
        """Logits of the rows that sample, on rank 0."""
        device = self._device
        sources = sample_sources(host, live) if device.is_gpu else None  # a CPU's steps are never underway
        if self._graphs is not None and not media and self._graphs.fits(host):
            return self._graphs.run(host, sources)
        batch = Batch.upload(host, device)
        if device.is_gpu:
            queries = zip(np.diff(host.query_starts).tolist(), host.kv_lens.tolist(), strict=True)
            batch.attention_tasks = cuda_ops.attention_tasks(
                queries, self._share.num_q_heads // self._share.num_kv_heads
            )
        if sources is not None:
            uploaded = device.upload(sources)
            feed_tokens(uploaded, self._samples, self._vision_from, batch.token_ids, batch.token_types)
        return self._runnable.run(batch, media, self._kv)

    def _sample(
        self, logits: Tensor | None, sampled: Sequence[LiveSequence]
    ) -> tuple[Download, Details | None]:
        """Sample on rank 0 and tell the others; the ids stay on the device for the next step, too."""
        if self._most_samples < len(sampled):
            self._most_samples = len(sampled)
            self._samples = self._device.empty((len(sampled),), "int32")
        token_ids, details = self._samples, None
        if self._most_samples > len(sampled):
            token_ids = self._samples[: len(sampled)]
        if logits is not None:
            if self._sampler.reads_tokens(sampled):
                self._settle()
            details = self._sampler.sample(logits, sampled, token_ids)
        self._device.broadcast(token_ids, 0)
        return self._device.download_later(token_ids), details

    def _settle(self, all_but: int = 0) -> None:
        """Wait for the tokens of all running steps but the last `all_but`, and put them into the mirror."""
        while len(self._running) > all_but:
            self._running.pop(0).settle()

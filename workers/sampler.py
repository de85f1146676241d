"""From logits to tokens: what each row of a step wants, in the form cuda_ops.sample_tokens takes.

Runs on rank 0 only. Which tokens end a sequence is the engine's decision; here end tokens are only banned
while a sequence has fewer than min_tokens. Grammars are followed in guides.py.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

import cuda_ops
from engine.messages import SamplingParams
from engine.model_config import ModelConfig
from workers.device.base import Device, Tensor
from workers.guides import Guides
from workers.model.workspace import Workspace
from workers.recording import Recording
from workers.running_step import Details
from workers.sequences import LiveSequence


@dataclasses.dataclass(slots=True)
class _Rows:
    """What the rows of a step want, kept as long as the same sequences come."""

    params: list[SamplingParams]
    batch: cuda_ops.SamplingBatch
    num_top: int  # most likely tokens to tell, the most that any row wants
    wants_logprobs: bool
    has_penalty: bool
    has_min_tokens: bool
    has_guide: bool


class Sampler:
    """Knows which ids may ever be generated, and samples the rows of a step."""

    def __init__(
        self,
        device: Device,
        model: ModelConfig,
        padded_vocab_size: int,
        num_token_ids: int,
        vocabulary_file: Path = Path("vocabulary"),
    ) -> None:
        """`num_token_ids` ids have a meaning; rows of the vocabulary from there on are padding.

        vocabulary_file   what the ids write, for sequences with a grammar; read when the first one comes
        """
        self._device = device
        self._workspace = Workspace(device)
        self._eos_token_ids = model.eos_token_ids
        self._allowed_bits = device.upload(allowed_bits(model, padded_vocab_size, num_token_ids))
        self._guides = Guides(vocabulary_file, padded_vocab_size)
        self._kept: _Rows | None = None
        self._recording = Recording(device)

    def reads_tokens(self, live: Sequence[LiveSequence]) -> bool:
        """Whether `sample` looks at the ids of earlier tokens, which then have to be known."""
        rows = self._rows_of(live)
        return rows.has_penalty or rows.has_guide

    def sample(self, logits: Tensor, live: Sequence[LiveSequence], token_ids: Tensor) -> Details | None:
        """One token per row of logits [S, V] fp32 (overwritten) into token_ids [S] int32; -1: no numbers.

        Returns the log-probabilities if any row wants some.
        """
        take, rows = self._workspace.take, self._rows_of(live)
        logprobs = take("logprobs", (len(live),), "float32")
        top_ids = take("top_ids", (len(live), rows.num_top), "int32")
        top_logprobs = take("top_logprobs", (len(live), rows.num_top), "float32")
        given = (logits, self._batch(rows, live), token_ids, logprobs, top_ids, top_logprobs)
        self._recording.run(given, lambda: cuda_ops.sample_tokens(*given))
        if not rows.wants_logprobs:
            return None
        return Details(*map(self._device.download_later, (logprobs, top_ids, top_logprobs)))

    def _rows_of(self, live: Sequence[LiveSequence]) -> _Rows:
        params = [sequence.sampling for sequence in live]
        if self._kept is None or not _are_same(params, self._kept.params):
            self._kept = self._rows(params)
        return self._kept

    def _rows(self, params: list[SamplingParams]) -> _Rows:
        return _Rows(
            params,
            self._parameters(params),
            num_top=max((max(p.num_logprobs, 0) for p in params), default=0),
            wants_logprobs=any(p.num_logprobs >= 0 for p in params),
            has_penalty=any(map(_has_penalty, params)),
            has_min_tokens=any(p.min_tokens for p in params),
            has_guide=any(p.guide is not None for p in params),
        )

    def _batch(self, rows: _Rows, live: Sequence[LiveSequence]) -> cuda_ops.SamplingBatch:
        """What the op needs of this step."""
        counts = np.array([sequence.num_output_tokens for sequence in live], np.int64)
        counters = self._device.upload_again("sampler.counters", counts)
        if rows.batch.counters is not counters:
            rows.batch = dataclasses.replace(rows.batch, counters=counters)
        changes = {}
        if rows.has_penalty:
            changes["history"], changes["history_starts"] = _ragged([_history(s) for s in live])
            changes["num_prompt_tokens"] = np.array([s.num_prompt_tokens for s in live], np.int32)
        if rows.has_min_tokens:
            changes["banned"], changes["banned_starts"] = _ragged([self._banned(s) for s in live])
        if rows.has_guide:
            changes["row_bits"] = self._guides.row_bits(live)
        uploaded = {name: self._device.upload(array) for name, array in changes.items()}
        return dataclasses.replace(rows.batch, **uploaded) if uploaded else rows.batch

    def _parameters(self, params: list[SamplingParams]) -> cuda_ops.SamplingBatch:
        """Rows without history and bans."""
        upload, rows = self._device.upload, len(params)
        nothing, no_starts = upload(_NOTHING), upload(np.zeros(rows + 1, np.int32))
        return cuda_ops.SamplingBatch(
            temperature=upload(_floats(p.temperature for p in params)),
            top_k=upload(np.array([p.top_k for p in params], np.int32)),
            top_p=upload(_floats(p.top_p for p in params)),
            min_p=upload(_floats(p.min_p for p in params)),
            repetition=upload(_floats(p.repetition_penalty for p in params)),
            presence=upload(_floats(p.presence_penalty for p in params)),
            frequency=upload(_floats(p.frequency_penalty for p in params)),
            seeds=upload(np.array([_signed64(p.seed) for p in params], np.int64)),
            counters=upload(np.zeros(rows, np.int64)),
            history=nothing,
            history_starts=no_starts,
            num_prompt_tokens=upload(np.zeros(rows, np.int32)),
            banned=nothing,
            banned_starts=no_starts,
            allowed_bits=self._allowed_bits,
        )

    def _banned(self, sequence: LiveSequence) -> np.ndarray:
        """Ids that would end the sequence too early."""
        params = sequence.sampling
        if sequence.num_output_tokens >= params.min_tokens or params.guide is not None:
            return _NOTHING
        ends = params.stop_token_ids + (() if params.ignore_eos else self._eos_token_ids)
        return np.array(ends, np.int32)


def allowed_bits(model: ModelConfig, padded_vocab_size: int, num_token_ids: int) -> np.ndarray:
    """[ceil(V / 32)] int32, bit id % 32 of word id / 32 set where id may be generated.

    Never generated: padding rows, the media placeholder and the markers around media, which mean something
    only where the api has put pixels behind them.
    """
    allowed = np.zeros(-(-padded_vocab_size // 32) * 32, bool)
    allowed[: min(num_token_ids, model.vocab_size)] = True
    for token_id in (
        model.image_patch_id,
        model.image_start_id,
        model.image_end_id,
        model.video_start_id,
        model.video_end_id,
    ):
        if 0 <= token_id < len(allowed):
            allowed[token_id] = False
    return np.packbits(allowed, bitorder="little").view("<u4").astype(np.uint32).view(np.int32)


_NOTHING = np.empty(0, np.int32)


def _history(sequence: LiveSequence) -> np.ndarray:
    """Prompt and output of a sequence with a penalty; nothing for the others, who do not need it."""
    return sequence.tokens.view() if _has_penalty(sequence.sampling) else _NOTHING


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _are_same(params: list[SamplingParams], kept: list[SamplingParams]) -> bool:
    """Whether these are the very same objects, row by row."""
    return len(params) == len(kept) and all(map(operator.is_, params, kept))


def _ragged(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths -> all values in one array, and where each row starts."""
    starts = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    return np.concatenate(rows), starts


def _floats(values: Iterable[float]) -> np.ndarray:
    return np.fromiter(values, np.float32)


def _signed64(seed: int) -> int:
    """Any integer seed, wrapped into int64."""
    return (seed + 2**63) % 2**64 - 2**63

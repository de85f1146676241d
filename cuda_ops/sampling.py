"""From logits to the next token of every row, with its log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from cuda_ops.device_library import device_library
from cuda_ops.ffi import import_tvm_ffi
from cuda_ops.library import library
from cuda_ops.tensor import Tensor


@dataclass(frozen=True)
class SamplingBatch:
    """How each of S rows is sampled; one entry per row unless stated.

    The steps are taken in this order: allowed_bits, log-probabilities, repetition, presence and frequency,
    banned and row_bits, temperature, top_k, top_p, min_p, choice.
    """

    temperature: Tensor  # [S] fp32; below 1e-5: greedy, ties to the lowest id
    top_k: Tensor  # [S] int32; 0: off
    top_p: Tensor  # [S] fp32; smallest set of best tokens that holds this mass; 1: off
    min_p: Tensor  # [S] fp32; least probability relative to the best token's; 0: off
    repetition: Tensor  # [S] fp32; divides positive and multiplies negative logits of seen ids; 1: off
    presence: Tensor  # [S] fp32; subtracted once from ids in the output; 0: off
    frequency: Tensor  # [S] fp32; subtracted per occurrence in the output; 0: off
    seeds: Tensor  # [S] int64
    counters: Tensor  # [S] int64; index of the token within the output
    history: Tensor  # [N] int32; prompt then output of each row, empty where no penalty needs it
    history_starts: Tensor  # [S+1] int32 into history
    num_prompt_tokens: Tensor  # [S] int32; how much of a row's history is prompt
    banned: Tensor  # [B] int32; ids a row may not choose now
    banned_starts: Tensor  # [S+1] int32 into banned
    allowed_bits: Tensor  # [ceil(V/32)] int32; bit id % 32 of word id / 32; 1: may ever be generated
    row_bits: Tensor | None = None  # [S, ceil(V/32)] int32; likewise, what each row may choose now

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """What the compiled op takes, converted once for a batch that is used in many steps."""
        convert = import_tvm_ffi().convert
        return tuple(convert(getattr(self, name)) for name in _FIELDS)


_FIELDS = [field.name for field in fields(SamplingBatch)]


def sample_tokens(
    logits: Tensor,
    batch: SamplingBatch,
    token_ids: Tensor,
    logprobs: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
) -> None:
    """Choose one token per row and report log-probabilities of the model's own distribution.

    logits [S, V] fp32, overwritten · token_ids [S] int32 · logprobs [S] fp32 of the chosen token · top_ids
    [S, n] int32 and top_logprobs [S, n] fp32, best first; n may be 0
    Log-probabilities are log_softmax of the logits that came in, over the allowed ids. The choice is the
    highest logit / temperature + Gumbel(seed, counter, id), where the noise is a function of these three
    alone (csrc/cpu/sampling.cc), so a row's token depends on its own inputs alone. A row with NaN logits, or
    with nothing left to choose, gets token -1 and log-probability -inf.
    """
    library.sample_tokens(logits, *batch.arguments, token_ids, logprobs, top_ids, top_logprobs)


def sampling_workspace_bytes(num_rows: int, vocab: int) -> int:
    """What sample_tokens needs of the workspace on a GPU."""
    return int(device_library.sampling_workspace_bytes(num_rows, vocab))

"""The sampler's CUDA body: the twin's choices, exact top-k and top-p, a row alone and in a batch."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from cuda_ops.emulator import emulator
from tests.checks import assert_close, assert_same_bits
from tests.conftest import Rand
from tests.cuda_ops import references
from tests.cuda_ops.test_sampling import DEFAULTS, TYPES, flattened
from tests.cuda_ops.test_sampling import sample as sample_on_cpu

from .structures import aligned


class SamplingBatch(ctypes.Structure):
    _fields_ = [
        ("num_rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "temperature", "top_p", "min_p", "repetition", "presence", "frequency", "top_k",
                "num_prompt_tokens", "seeds", "counters", "history", "history_starts", "banned",
                "banned_starts", "allowed_bits", "row_bits",
            )
        ),
    ]  # fmt: skip


class SamplingResult(ctypes.Structure):
    _fields_ = [
        ("token_ids", ctypes.c_void_p),
        ("logprobs", ctypes.c_void_p),
        ("top_ids", ctypes.c_void_p),
        ("top_logprobs", ctypes.c_void_p),
        ("num_top", ctypes.c_int64),
    ]


def sample(
    logits: np.ndarray, *, prompts: Any = None, outputs: Any = None, banned: Any = None, forbidden: Any = (),
    num_top: int = 0, row_bits: np.ndarray | None = None, **options: Any,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """As the twin's test helper: token_ids, logprobs, top_ids, top_logprobs of `logits` [S, V]."""
    rows, vocab = logits.shape
    arrays = {
        name: np.broadcast_to(np.asarray(options.pop(name, value)), (rows,)).astype(
            TYPES.get(name, np.float32)
        )
        for name, value in DEFAULTS.items()
    }
    assert not options, f"unknown options {options}"
    prompts, outputs = prompts or [[]] * rows, outputs or [[]] * rows
    history, history_starts = flattened([[*p, *o] for p, o in zip(prompts, outputs, strict=True)])
    banned_ids, banned_starts = flattened(banned or [[]] * rows)
    bits = np.full(-(-vocab // 32) * 32, 1, np.uint8)
    bits[list(forbidden)] = 0
    arrays |= {
        "num_prompt_tokens": np.array([len(p) for p in prompts], np.int32),
        "history": history,
        "history_starts": history_starts,
        "banned": banned_ids,
        "banned_starts": banned_starts,
        "allowed_bits": np.packbits(bits, bitorder="little").view(np.int32),
    }
    if row_bits is not None:
        arrays["row_bits"] = row_bits
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    batch = SamplingBatch(num_rows=rows, vocab=vocab, **{name: a.ctypes.data for name, a in arrays.items()})
    outs = (
        np.full(rows, -9, np.int32),
        np.full(rows, np.nan, np.float32),
        np.full((rows, num_top), -9, np.int32),
        np.full((rows, num_top), np.nan, np.float32),
    )
    result = SamplingResult(*(out.ctypes.data for out in outs), num_top)
    workspace = aligned(emulator().number("sampling_workspace_bytes", rows, vocab), np.uint8)
    emulator().call(
        "sample_tokens", None, logits.astype(np.float32).copy(), (batch, list(arrays.values())),
        (result, list(outs)), workspace,
    )  # fmt: skip
    return outs


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.6, "top_k": 7},
        {"top_p": 0.8},
        {"top_k": 50, "top_p": 0.5, "temperature": 1.7},
        {"min_p": 0.1},
        {"top_k": 600, "min_p": 0.02, "top_p": 0.97},
    ],
)
@pytest.mark.parametrize("has_row_bits", [False, True])
def test_choices_are_the_twins(rand: Rand, options: dict[str, Any], has_row_bits: bool) -> None:
    logits, seeds = rand.normal(12, 1500, scale=2.0), np.arange(12) + rand.seed
    prompts = [rand.numpy.integers(0, 1500, 30).tolist() for _ in range(12)]
    outputs = [rand.numpy.integers(0, 1500, 9).tolist() for _ in range(12)]
    given = {
        "prompts": prompts, "outputs": outputs, "banned": [[3, 4]] * 12, "forbidden": [5, 1499],
        "seeds": seeds, "repetition": 1.2, "presence": 0.3, "frequency": 0.2, "num_top": 5, **options,
    }  # fmt: skip
    if has_row_bits:
        bits = rand.numpy.integers(-(2**31), 2**31, (12, 47)).astype(np.int32)
        bits[2], bits[5] = 0, -1  # nothing to choose, and no limit
        given["row_bits"] = bits
    ids, logprobs, top_ids, top_logprobs = sample(logits, **given)
    twin_ids, twin_logprobs, twin_top_ids, twin_top_logprobs = sample_on_cpu(logits, **given)
    same = ids == twin_ids
    # Noise is fp32 here and double there: a near tie may fall otherwise.
    assert same.sum() >= 11, (ids, twin_ids)
    assert (ids[2] == -1) == has_row_bits
    chosen = same & (ids >= 0)
    assert_close(logprobs[chosen], twin_logprobs[chosen], 1e-4)
    assert (logprobs[ids < 0] == -np.inf).all()
    assert (top_ids == twin_top_ids).all()
    assert_close(top_logprobs, twin_top_logprobs, 1e-4)


@pytest.mark.parametrize(
    "options", [{"top_k": 5}, {"top_p": 0.5}, {"top_k": 40, "top_p": 0.6}, {"min_p": 0.3}, {"top_p": 1e-9}]
)
def test_draws_stay_inside_the_kept_set_and_reach_all_of_it(rand: Rand, options: dict[str, Any]) -> None:
    logits = rand.normal(60, scale=1.5)
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    kept = references.kept_tokens(logits, **full)
    num_draws = 60
    ids, *_ = sample(np.repeat(logits[None], num_draws, axis=0), counters=np.arange(num_draws), **options)
    assert set(ids.tolist()) <= set(kept)
    p = references.softmax(logits[kept].astype(np.float64))
    certain = {id for id, share in zip(kept, p, strict=True) if share > 0.35}  # missed with p < 1e-11
    assert certain <= set(ids.tolist())


@pytest.mark.parametrize(
    ("options", "count"), [({"top_k": 7}, 7), ({"top_p": 0.0105}, 11), ({"top_k": 600}, 600)]
)
def test_of_equal_scores_the_lowest_ids_stay(options: dict[str, Any], count: int) -> None:
    logits = np.zeros((40, 1000), np.float32)
    ids, *_ = sample(logits, counters=np.arange(40), **options)
    assert ids.min() >= 0 and ids.max() < count and len(set(ids.tolist())) > min(count, 40) // 2


def test_greedy_takes_the_lowest_id_of_equals(rand: Rand) -> None:
    logits = rand.normal(3, 1000)
    logits[1, [17, 500, 999]] = 50.0
    ids, logprobs, _, _ = sample(logits, temperature=0.0)
    assert ids.tolist() == [int(logits[0].argmax()), 17, int(logits[2].argmax())]
    expected = [references.log_softmax(row)[i] for row, i in zip(logits, ids, strict=True)]
    assert_close(logprobs, np.array(expected), 1e-4)


def test_a_row_ignores_the_others(rand: Rand) -> None:
    logits, seeds = rand.normal(6, 700), np.arange(6) * 7
    together = sample(logits, seeds=seeds, counters=3, top_p=0.9, top_k=[0, 5, 0, 9, 600, 1], num_top=3)
    for row, top_k in enumerate([0, 5, 0, 9, 600, 1]):
        alone = sample(logits[row : row + 1], seeds=seeds[row], counters=3, top_p=0.9, top_k=top_k, num_top=3)
        for one, all_rows in zip(alone, together, strict=True):
            assert_same_bits(one[0], all_rows[row])


def test_rows_with_nan_or_nothing_left_say_minus_one() -> None:
    logits = np.zeros((4, 33), np.float32)
    logits[0, 32] = np.nan
    ids, logprobs, _, _ = sample(
        logits, banned=[[], list(range(33)), list(range(33)), []], temperature=[1.0, 0.0, 1.0, 0.0], num_top=2
    )
    assert ids.tolist() == [-1, -1, -1, 0]
    assert np.isneginf(logprobs[:3]).all() and np.isfinite(logprobs[3])
    assert sample(logits, forbidden=range(33))[0].tolist() == [-1] * 4


def test_more_top_ids_than_tokens_are_filled_with_minus_one() -> None:
    _, _, top_ids, top_logprobs = sample(np.array([[1.0, 3.0, 2.0]], np.float32), num_top=5)
    assert top_ids[0].tolist() == [1, 2, 0, -1, -1]
    assert np.isneginf(top_logprobs[0, 3:]).all()


def test_no_rows_is_fine() -> None:
    assert sample(np.zeros((0, 8), np.float32))[0].shape == (0,)

"""How far an int8 KV cache moves the answers of a whole model.

That a sequence's bits do not depend on what is around it is in test_equality.py, the rule of the rounding in
tests/cuda_ops/test_int8_cache.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from tests.checks import assert_close
from tests.conftest import Rand
from tests.workers.builders import Prompt, make_dense_config, make_prompt, make_raw_weights
from tests.workers.ranks import GREEDY, Driver, Ranks

PROMPT, DECODED = 300, 4  # tokens; more than one segment of attention


def all_logprobs(ranks: Ranks, prompt: Prompt, generated: list[int]) -> np.ndarray:
    """[vocabulary] of the token after the prompt and what was generated, one of these at a time."""
    driver = Driver(ranks)
    everything = replace(GREEDY, num_logprobs=320)
    seq_id = driver.add(prompt, everything, generated)
    driver.generate([seq_id], 1, [PROMPT, *[1] * (len(generated) - 1)])
    (token,) = driver.outputs[seq_id]
    assert token.logprobs is not None
    found = np.full(320, np.nan, np.float32)
    found[token.logprobs.top_ids] = token.logprobs.top_logprobs
    return found


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 0.02), ("bfloat16", 0.03)])
def test_logits_stay_within_a_few_percent_of_their_spread_of_those_of_a_plain_cache(
    rand: Rand, media_folder: Path, dtype: str, allowed: float
):
    """Without experts, of which a rounding could choose another.

    A step of int8 is 1/127 of the largest of 16 values, some two deviations, so a key or value is off by
    2/127/sqrt(12) = 0.5 % of a deviation, root mean square; three layers add theirs to about 1 % of the
    logits' spread. Twice that is allowed. Beside bf16 activations, which move the logits by as much
    themselves, the roundings behind attention come out differently, too.
    """
    config = make_dense_config(dtype=dtype)
    raw = make_raw_weights(config, rand)
    prompt = make_prompt(rand, config, media_folder, [PROMPT])
    generated = rand.numpy.integers(5, 300, DECODED).tolist()
    plain, int8 = (
        all_logprobs(Ranks(config, raw, media_folder, kv_dtype=kv_dtype), prompt, generated)
        for kv_dtype in (None, "int8")
    )
    moved = (int8 - plain) / plain.std()
    assert moved.any(), "the cache was not int8"
    assert_close(np.sqrt(np.mean(moved**2)), 0, allowed, f"{rand}: root mean square")
    assert_close(moved, np.zeros_like(moved), 4 * allowed, f"{rand}: of the logits' spread")

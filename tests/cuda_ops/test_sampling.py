"""The sampler: what may be drawn, how often, and that a row depends on nothing but itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

import cuda_ops
from tests.checks import assert_close, assert_same_bits
from tests.cuda_ops import references

DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition": 1.0, "presence": 0.0,
            "frequency": 0.0, "seeds": 1, "counters": 0}  # fmt: skip
TYPES = {"top_k": np.int32, "seeds": np.int64, "counters": np.int64}


def sample(
    logits, *, prompts=None, outputs=None, banned=None, forbidden=(), row_bits=None, num_top=0, **options
):
    """Sample every row of `logits` [S, V]; each option is one value or one per row.

    Returns token_ids, logprobs, top_ids, top_logprobs.
    """
    rows, vocab = logits.shape
    columns = {
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
    batch = cuda_ops.SamplingBatch(
        **{name: np.ascontiguousarray(column) for name, column in columns.items()},
        history=history,
        history_starts=history_starts,
        num_prompt_tokens=np.array([len(p) for p in prompts], np.int32),
        banned=banned_ids,
        banned_starts=banned_starts,
        allowed_bits=np.packbits(bits, bitorder="little").view(np.int32),
        row_bits=row_bits,
    )
    ids, logprobs = np.full(rows, -9, np.int32), np.full(rows, np.nan, np.float32)
    top_ids = np.full((rows, num_top), -9, np.int32)
    top_logprobs = np.full((rows, num_top), np.nan, np.float32)
    cuda_ops.sample_tokens(logits.astype(np.float32).copy(), batch, ids, logprobs, top_ids, top_logprobs)
    return ids, logprobs, top_ids, top_logprobs


def flattened(lists):
    starts = np.cumsum([0, *(len(one) for one in lists)]).astype(np.int32)
    return np.array([id for one in lists for id in one], np.int32), starts


def drawn(logits, num_draws=400, **options):
    """The ids drawn from one row over many counters."""
    rows = np.repeat(logits[None], num_draws, axis=0)
    return sample(rows, counters=np.arange(num_draws), **options)[0]


def test_greedy_takes_the_highest_and_the_lowest_id_of_equals(rand):
    logits = rand.normal(3, 1000)
    logits[1, [17, 500, 999]] = 50.0
    ids, logprobs, _, _ = sample(logits, temperature=0.0)
    assert ids.tolist() == [int(logits[0].argmax()), 17, int(logits[2].argmax())]
    expected = [references.log_softmax(row)[i] for row, i in zip(logits, ids, strict=True)]
    assert_close(logprobs, np.array(expected), 1e-4)


def test_top_k_of_one_is_greedy_at_any_temperature(rand):
    logits = rand.normal(20, 333)
    assert_same_bits(
        sample(logits, top_k=1, temperature=5.0, seeds=np.arange(20))[0], sample(logits, temperature=0.0)[0]
    )


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5},
        {"top_k": 40, "top_p": 0.6},
        {"top_p": 0.5},
        {"top_p": 0.05},
        {"min_p": 0.3},
        {"top_p": 0.9, "min_p": 0.2, "temperature": 0.7},
        {"top_k": 3, "min_p": 0.9},
    ],
)
def test_draws_stay_inside_the_kept_set_and_reach_all_of_it(rand, options):
    logits = rand.normal(200, scale=1.5)
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    kept = references.kept_tokens(logits, **full)
    ids = drawn(logits, num_draws=3000, **options)
    assert set(ids.tolist()) <= set(kept)
    p = references.softmax(logits[kept].astype(np.float64) / full["temperature"])
    certain = {id for id, share in zip(kept, p, strict=True) if share > 0.01}  # missed with p < 1e-13
    assert certain <= set(ids.tolist())


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
def test_a_vanishing_top_p_keeps_the_best_token(rand, top_p):
    logits = rand.normal(100)
    assert set(drawn(logits, top_p=top_p).tolist()) == {int(logits.argmax())}


def test_top_p_of_equal_logits_keeps_the_lowest_ids():
    assert set(drawn(np.zeros(1000, np.float32), top_p=0.0105).tolist()) == set(range(11))


def test_top_k_of_equal_logits_keeps_the_lowest_ids():
    assert set(drawn(np.zeros(5000, np.float32), top_k=7).tolist()) == set(range(7))


@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_p": 0.999}, {"min_p": 1e-6}])
def test_draws_follow_the_softmax(rand, options):
    logits = rand.normal(12, scale=1.0)
    num_draws = 20000
    counts = np.bincount(
        drawn(logits, num_draws=num_draws, temperature=0.8, seeds=rand.seed, **options), minlength=12
    )
    kept = references.kept_tokens(logits, 0.8, options.get("top_k", 0), options.get("top_p", 1.0), 0.0)
    expected = np.zeros(12)
    expected[kept] = references.softmax(logits[kept].astype(np.float64) / 0.8) * num_draws
    used = expected > 0
    chi_square = ((counts[used] - expected[used]) ** 2 / expected[used]).sum()
    assert chi_square < 50, f"{chi_square:.1f} with 11 degrees of freedom (p < 1e-6 above 50)"
    assert counts[~used].sum() == 0


def test_draws_over_seeds_follow_the_softmax_in_a_large_vocabulary(rand):
    logits = np.full(103424, -4.0, np.float32)
    logits[[5, 70000]] = [8.0, 7.0]
    ids = sample(np.repeat(logits[None], 300, axis=0), seeds=np.arange(300))[0]
    p = references.softmax(logits.astype(np.float64))
    for id in (5, 70000):
        spread = math.sqrt(300 * p[id] * (1 - p[id]))
        assert abs((ids == id).sum() - 300 * p[id]) < 5 * spread


def test_a_row_is_repeatable_and_ignores_the_others(rand):
    logits = rand.normal(17, 500)
    seeds, counters = np.arange(17) * 7, np.arange(17) + 100
    together = sample(logits, seeds=seeds, counters=counters, top_p=0.9, num_top=3)
    cuda_ops.set_num_threads(3)
    try:
        threaded = sample(logits, seeds=seeds, counters=counters, top_p=0.9, num_top=3)
    finally:
        cuda_ops.set_num_threads(1)
    for i in range(17):
        alone = sample(logits[i : i + 1], seeds=seeds[i], counters=counters[i], top_p=0.9, num_top=3)
        for one, all_rows, other in zip(alone, together, threaded, strict=True):
            assert_same_bits(one[0], all_rows[i])
            assert_same_bits(other[i], all_rows[i])


def test_a_large_vocabulary_has_the_same_bits_on_any_number_of_threads(rand):
    logits = rand.normal(2, 20_011, scale=4.0)
    logits[0, 4096:8192] = -np.inf
    options = {"temperature": [0.0, 1.0], "num_top": 2, "forbidden": list(range(12_288, 16_384))}
    alone = sample(logits, **options)
    cuda_ops.set_num_threads(3)
    try:
        threaded = sample(logits, **options)
    finally:
        cuda_ops.set_num_threads(1)
    for one, other in zip(alone, threaded, strict=True):
        assert_same_bits(one, other)
    logits[:, 12_288:16_384] = -np.inf
    expected = np.array([references.log_softmax(row)[i] for row, i in zip(logits, alone[0], strict=True)])
    assert_close(alone[1], expected, 1e-4)


@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.01}], ids=str)
def test_one_row_that_threads_share_draws_what_it_draws_on_one(rand, options):
    logits = rand.normal(1, 20_011)
    alone = [sample(logits, counters=counter, **options)[0][0] for counter in range(40)]
    cuda_ops.set_num_threads(3)
    try:
        threaded = [sample(logits, counters=counter, **options)[0][0] for counter in range(40)]
    finally:
        cuda_ops.set_num_threads(1)
    assert threaded == alone


@pytest.mark.parametrize("place", [0, 4095, 4096, 20_010])
def test_greedy_finds_the_first_of_equals_anywhere_in_a_large_vocabulary(place):
    logits = np.zeros((1, 20_011), np.float32)
    logits[0, place:] = 3.0
    assert sample(logits, temperature=0.0)[0].tolist() == [place]
    assert sample(logits, temperature=0.0, banned=[[place]])[0].tolist() == [
        place + 1 if place < 20_010 else 0
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 5000, 8191, 20_010])
def test_what_is_no_number_is_found_anywhere_in_a_large_vocabulary(place, value):
    logits = np.full((1, 20_011), -np.inf, np.float32)
    logits[0, 100] = 1.0
    logits[0, place] = value
    ids, logprobs, _, _ = sample(logits, temperature=0.0)
    assert (ids.tolist(), logprobs.tolist()) == ([-1], [-np.inf])


def test_another_seed_or_counter_draws_differently():
    logits = np.zeros((1, 4096), np.float32)
    ids = {int(sample(logits, seeds=s, counters=c)[0][0]) for s in (1, 2, -5, 2**40) for c in (0, 1, 2)}
    assert len(ids) >= 11


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 60},
        {"top_k": 2000, "top_p": 0.7},
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"top_p": 0.9999999},
        {"min_p": 0.2},
        {"top_p": 0.8, "temperature": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
def test_a_draw_is_the_highest_sum_with_the_documented_noise(rand, options, scale):
    """Gumbel noise of Philox4x32-10 with key = seed and counter words (counter, 0, id / 4, 0)."""
    logits, seed, num_draws = rand.normal(20_011, scale=scale), 0x1234567890ABCDEF, 40
    logits[rand.numpy.permutation(20_011)[:500]] = -np.inf
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    kept = np.array(
        references.kept_tokens(logits / np.float32(full["temperature"]), **full | {"temperature": 1.0})
    )
    cooled = (logits / np.float32(full["temperature"])).astype(np.float64)[kept]
    expected = []
    for counter in range(num_draws):
        u = (philox_words(seed, counter, kept) + 0.5) / 2**32
        expected.append(int(kept[np.argmax(cooled - np.log(-np.log1p(-u)))]))
    ids = drawn(logits, num_draws, seeds=seed, **options).tolist()
    assert ids == expected, f"draw {np.argmax(np.array(ids) != expected)}: {ids}, not {expected}"


def test_draws_of_ids_near_the_end_see_the_noise_of_their_ids():
    for vocab in (1, 3, 63, 64, 65, 4095, 4097):
        noise = (philox_words(7, 5, np.arange(vocab)) + 0.5) / 2**32
        ids = sample(np.zeros((1, vocab), np.float32), seeds=7, counters=5)[0]
        assert ids.tolist() == [int(np.argmax(-np.log(-np.log1p(-noise))))], f"vocabulary of {vocab}"


def philox_words(key: int, counter: int, ids: np.ndarray) -> np.ndarray:
    """What `philox` gives each of `ids`, all at once."""
    k0, k1, low = np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32), np.uint64(0xFFFFFFFF)
    c = [np.full(len(ids), value, np.uint64) for value in (counter & 0xFFFFFFFF, counter >> 32, 0, 0)]
    c[2] = ids.astype(np.uint64) // np.uint64(4)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k0, b & low, (a >> np.uint64(32)) ^ c[3] ^ k1, a & low]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.choose(ids % 4, c)


def philox(key: int, counter: list[int]) -> list[int]:
    k, c = [key & 0xFFFFFFFF, key >> 32], list(counter)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_gives_its_published_answers(rand):
    assert philox(0, [0, 0, 0, 0]) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox(2**64 - 1, [ones] * 4) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    ids, key, counter = rand.numpy.integers(0, 2**20, 20), 0x8234567890ABCDEF, 2**40 + 3
    words = [philox(key, [3, 2**8, id // 4, 0])[id % 4] for id in ids.tolist()]
    assert philox_words(key, counter, ids).tolist() == words


def test_repetition_counts_prompt_and_output_but_presence_and_frequency_only_output():
    logits = np.array([[4.0, 3.9, 3.8, -1.0]], np.float32)
    assert sample(logits, temperature=0.0, repetition=1.5, prompts=[[0]], outputs=[[1]])[0][0] == 2
    assert sample(logits, temperature=0.0, presence=1.0, prompts=[[0, 0]], outputs=[[1]])[0][0] == 0
    assert sample(logits, temperature=0.0, presence=1.0, outputs=[[0, 0, 0]])[0][0] == 1
    assert sample(logits, temperature=0.0, frequency=0.08, outputs=[[0]])[0][0] == 0
    assert sample(logits, temperature=0.0, frequency=0.08, outputs=[[0, 0]])[0][0] == 1
    assert sample(logits, temperature=0.0, frequency=0.08, outputs=[[0, 0, 1, 1]])[0][0] == 0
    assert sample(logits, temperature=0.0, frequency=0.08, prompts=[[0, 0]])[0][0] == 0


def test_repetition_pushes_negative_logits_further_down():
    logits = np.array([[-1.0, -1.5]], np.float32)
    assert sample(logits, temperature=0.0, repetition=2.0, prompts=[[0]])[0][0] == 1


def test_penalties_of_one_row_leave_no_trace_in_the_next():
    logits = np.array([[2.0, 1.0]] * 3, np.float32)
    ids, *_ = sample(logits, temperature=0.0, presence=[5.0, 5.0, 5.0], outputs=[[0], [1], []])
    assert ids.tolist() == [1, 0, 0]


def test_logprobs_are_the_models_own_whatever_penalties_and_temperature_do():
    logits = np.array([[4.0, 3.0, 2.0, 1.0]], np.float32)
    ids, logprobs, top_ids, top_logprobs = sample(
        logits, temperature=0.0, presence=3.0, outputs=[[0]], banned=[[1]], num_top=4
    )
    expected = references.log_softmax(logits[0])
    assert ids[0] == 2
    assert_close(logprobs, expected[[2]], 1e-6)
    assert top_ids[0].tolist() == [0, 1, 2, 3]
    assert_close(top_logprobs[0], expected, 1e-6)


def test_the_logprob_of_a_penalised_token_is_still_its_own():
    logits = np.array([[4.0, 1.0]], np.float32)
    ids, logprobs, _, _ = sample(logits, temperature=0.0, presence=1.0, repetition=1.1, outputs=[[0]])
    assert ids[0] == 0
    assert_close(logprobs, references.log_softmax(logits[0])[[0]], 1e-6)


def test_forbidden_ids_have_no_probability_at_all(rand):
    logits = rand.normal(70)
    logits[[3, 69]] = 90.0
    ids, logprobs, top_ids, _ = sample(logits[None], temperature=0.0, forbidden=[3, 69], num_top=5)
    masked = logits.copy()
    masked[[3, 69]] = -np.inf
    assert ids[0] == int(masked.argmax()) and not {3, 69} & set(top_ids[0].tolist())
    assert_close(logprobs, references.log_softmax(masked)[ids], 1e-5)


def test_banned_ids_are_not_chosen_now(rand):
    logits = rand.normal(40)
    best = [int(i) for i in np.argsort(-logits)[:3]]
    ids, *_ = sample(np.stack([logits, logits]), temperature=0.0, banned=[best[:2], []])
    assert ids.tolist() == [best[2], best[0]]


def bits_of(*allowed, vocab):
    """One row of row_bits for each of `allowed`, which lists ids."""
    bits = np.zeros((len(allowed), -(-vocab // 32) * 32), np.uint8)
    for row, ids in zip(bits, allowed, strict=True):
        row[list(ids)] = 1
    return np.packbits(bits, axis=1, bitorder="little").view(np.int32)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.7}, {"repetition": 3.0}]
)
def test_a_row_chooses_among_its_own_bits_and_tells_the_models_own_logprob(rand, options):
    logits = rand.normal(3, 70)
    kept = [{3, 5, 69}, {64}, set(range(70))]
    ids, logprobs, top_ids, _ = sample(
        logits, row_bits=bits_of(*kept, vocab=70), prompts=[[3, 64]] * 3, num_top=4, **options
    )
    free, *_ = sample(logits, prompts=[[3, 64]] * 3, **options)
    assert all(int(token) in allowed for token, allowed in zip(ids, kept, strict=True)), ids
    assert ids[2] == free[2]
    own = np.stack([references.log_softmax(row) for row in logits])
    assert_close(logprobs, own[np.arange(3), ids], 1e-5)
    assert top_ids[1, 0] == logits[1].argmax()


def test_a_row_whose_bits_leave_nothing_says_minus_one(rand):
    ids, *_ = sample(rand.normal(2, 40), row_bits=bits_of([], [7], vocab=40))
    assert ids.tolist() == [-1, 7]


def test_row_bits_of_another_number_of_rows_are_refused(rand):
    with pytest.raises(ValueError, match="row_bits must be"):
        sample(rand.normal(2, 40), row_bits=bits_of([7], vocab=40))


def test_top_logprobs_come_best_first_with_ties_by_id(rand):
    logits = rand.normal(4, 301)
    logits[2, [9, 200]] = 30.0
    _, _, top_ids, top_logprobs = sample(logits, num_top=20)
    for row in range(4):
        order = np.lexsort((np.arange(301), -logits[row]))[:20]
        assert top_ids[row].tolist() == order.tolist()
        assert_close(top_logprobs[row], references.log_softmax(logits[row])[order], 1e-5)


def test_a_row_with_nan_or_nothing_left_says_minus_one():
    logits = np.zeros((3, 33), np.float32)
    logits[0, 32] = np.nan
    ids, logprobs, _, _ = sample(logits, banned=[[], list(range(33)), []], temperature=[1.0, 0.0, 0.0])
    assert ids.tolist() == [-1, -1, 0]
    assert np.isneginf(logprobs[:2]).all() and np.isfinite(logprobs[2])


def test_tiny_temperatures_are_greedy(rand):
    logits = rand.normal(1, 50, scale=20.0)
    for temperature in (0.0, 1e-30, 1e-4):
        assert sample(logits, temperature=temperature)[0][0] == int(logits.argmax())


def test_no_rows_is_fine():
    ids, *_ = sample(np.zeros((0, 8), np.float32))
    assert ids.shape == (0,)


def test_a_history_id_beyond_the_vocabulary_is_refused():
    with pytest.raises(
        ValueError, match="sample_tokens: history_starts must ascend from 0 and history hold ids"
    ):
        sample(np.zeros((1, 8), np.float32), prompts=[[8]])

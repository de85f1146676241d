"""What the hot kernels ask of memory, counted by the emulator: the bytes they promise and no bank twice."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from cuda_ops.emulator import Cost, emulator
from tests.conftest import Rand

from .builders import NEEDS_HOOKS, to_bf16
from .structures import aligned, pack
from .test_attention import make_sequence, run_batch, segment_attention, segments_of
from .test_linear import linear

pytestmark = [
    NEEDS_HOOKS,
    pytest.mark.skipif(
        shutil.which("addr2line") is None,
        reason="addr2line (binutils), which names source lines, is not installed",
    ),
]
SECTOR = 32  # bytes


def sectors(costs: list[Cost], kernel: str) -> int:
    return sum(cost.cost for cost in costs if cost.kernel == kernel and cost.memory == "global")


def conflicts(costs: list[Cost], *files: str) -> list[Cost]:
    """Accesses of these files to shared memory that take more turns than their bytes need."""
    shared = [cost for cost in costs if cost.memory == "shared" and cost.place.split(":")[0] in files]
    assert shared, f"nothing of {files} touched shared memory"
    return [cost for cost in shared if cost.cost > cost.least]


def at_sector(array: np.ndarray) -> np.ndarray:
    """A copy that begins where a device allocation would."""
    copy = aligned(array.size, array.dtype.type).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize(("kind", "bits"), [("int4", 4.5), ("int8", 8), ("bfloat16", 16)])
def test_a_product_of_one_row_fetches_each_weight_once(rand: Rand, kind: str, bits: float) -> None:
    n, k = 64, 2048  # int4 with a bf16 scale per 32 columns: 4.5 bits
    weight, x = pack(rand.normal(1, n, k), kind, 32), at_sector(to_bf16(rand.normal(1, k)))
    with emulator().profile() as costs:
        linear(x, weight)
    rows = n / 16 * k * 2  # the row is read again for every sixteen outputs, from L2
    assert sectors(costs, "grouped_linear") * SECTOR <= 1.02 * (n * k * bits / 8 + rows) + n * 4 + 1024


@pytest.mark.parametrize("kind", ["int4", "int8", "bfloat16", "float32"])
@pytest.mark.parametrize(("m", "k"), [(1, 2048), (1, 256), (12, 256), (32, 256)])
def test_products_read_their_operands_without_bank_conflicts(rand: Rand, kind: str, m: int, k: int) -> None:
    weight, x = pack(rand.normal(1, 64, k), kind, 64), to_bf16(rand.normal(m, k))
    with emulator().profile() as costs:
        linear(x, weight)
    assert not conflicts(costs, "tiles.cuh")
    # What is left is the sum over the slices, once per task.
    assert sum(cost.cost - cost.least for cost in conflicts(costs, "grouped_linear.cuh")) <= 64 * m / 2


def test_decode_fetches_each_key_and_value_once(rand: Rand) -> None:
    kv_len, head_dim = 512, 128
    sequence = make_sequence(rand, 1, kv_len, 8, 1, head_dim)
    with emulator().profile() as costs:
        run_batch(rand, [sequence])
    bytes_of_cache = 2 * kv_len * head_dim * 2
    partials = 2 * 8 * (head_dim + 2) * 4  # two segments of eight rows
    tables = 2 * kv_len / 2 * SECTOR  # a warp looks up two rows at a time, from L1
    assert sectors(costs, "decode_attention") * SECTOR <= 1.1 * bytes_of_cache + 4 * partials + tables


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("num_queries", [1, 20])
def test_attention_reads_its_tiles_without_bank_conflicts(
    rand: Rand, head_dim: int, num_queries: int
) -> None:
    with emulator().profile() as costs:
        run_batch(rand, [make_sequence(rand, num_queries, 130, 8, 1, head_dim)])
    assert not conflicts(costs, "attention.cuh", "paged_attention.cu")


@pytest.mark.parametrize("head_dim", [16, 64, 80])
def test_segment_attention_reads_its_tiles_without_bank_conflicts(rand: Rand, head_dim: int) -> None:
    with emulator().profile() as costs:
        segment_attention(*segments_of(rand, [130], 1, head_dim))
    assert not conflicts(costs, "attention.cuh")

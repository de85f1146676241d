"""The emulator runs right kernels right, and says of wrong ones what is wrong, where and who."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cuda_ops.emulator import Emulator, address_sanitizer_runtime, library_path
from tests.checks import assert_close, assert_same_bits
from tests.conftest import Rand

from .builders import NEEDS_HOOKS, from_bf16, reported, rounded, to_bf16
from .structures import aligned

HERE = Path(__file__).parent
pytestmark = NEEDS_HOOKS


@pytest.fixture(scope="module")
def probes() -> Emulator:
    return Emulator(library_path([HERE / "probes.cu"], "probes"))


def floats(size: int = 64) -> np.ndarray:
    return np.zeros(size, np.float32)


def test_threads_of_a_block_meet_at_a_barrier(probes: Emulator) -> None:
    out = floats()
    probes.call("block_sum", np.arange(64, dtype=np.float32), out, False)
    assert_same_bits(out, np.full(64, 2016, np.float32))


def test_a_missing_barrier_is_reported(probes: Emulator) -> None:
    with reported("thread (0,0,0): reads shared memory that nobody has written"):
        probes.call("block_sum", floats(), floats(), True)


def test_an_unwritten_byte_of_shared_memory_is_reported(probes: Emulator) -> None:
    with reported("kernel read_unwritten, block (0,0,0), thread (5,0,0): reads shared memory that nobody"):
        probes.call("read_unwritten", floats())


def test_two_barriers_at_once_are_reported(probes: Emulator) -> None:
    with reported("barrier divergence"):
        probes.call("divergent_barrier", floats())


def test_a_thread_that_leaves_before_a_barrier_is_reported(probes: Emulator) -> None:
    with reported("for ever, thread (7,0,0) has left the kernel (63 threads wait, 1 have left)"):
        probes.call("early_leaver", floats())


def test_lanes_in_two_warp_operations_are_reported(probes: Emulator) -> None:
    with reported("is at __syncwarp while thread (0,0,0) is at __shfl_xor_sync"):
        probes.call("divergent_warp", floats())


def test_a_warp_barrier_orders_the_lanes(probes: Emulator) -> None:
    out = floats()
    probes.call("missing_warp_barrier", out, False)
    assert_same_bits(out, (np.arange(64) ^ 1).astype(np.float32))
    with reported("shared memory"):
        probes.call("missing_warp_barrier", out, True)


def test_a_value_overwritten_before_all_have_read_it_is_reported(probes: Emulator) -> None:
    with reported("that another thread"):
        probes.call("overwrite", floats())


@pytest.mark.parametrize(
    ("stride", "wavefronts", "sectors"), [(1, 1, 4), (2, 2, 8), (5, 1, 20), (32, 32, 32)]
)
def test_strided_accesses_cost_what_the_hardware_takes(
    probes: Emulator, stride: int, wavefronts: int, sectors: int
) -> None:
    source = aligned(1024, np.float32)
    with probes.profile() as costs:
        probes.call("stride", source, floats(32), stride)
    strided = {cost.memory: cost for cost in costs if cost.requests == 1 and "probes.cu" in cost.place}
    assert strided["shared"].cost == wavefronts and strided["shared"].least == 1
    reads = [cost.cost for cost in costs if cost.memory == "global" and cost.requests == 1]
    assert sectors in reads


def test_an_asynchronous_copy_lands_when_it_is_waited_for(probes: Emulator) -> None:
    source, out = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    probes.call("copy", source, out, False)
    expected = source.copy()
    expected[12:16] = 0  # the invalid copy fills zeros
    assert_same_bits(out, expected)


def test_a_missing_wait_is_reported(probes: Emulator) -> None:
    with reported("before the cp.async into it was waited for"):
        probes.call("copy", np.zeros(128, np.uint32), np.zeros(128, np.uint32), True)


@pytest.mark.parametrize("shift", [1, -3])
def test_an_access_outside_of_the_arrays_is_reported(probes: Emulator, shift: int) -> None:
    with reported("reads 4 bytes outside of every buffer"):
        probes.call("past_the_end", floats(32), floats(32), shift)


def test_a_failed_launch_does_not_spoil_the_next(probes: Emulator) -> None:
    with reported("barrier"):
        probes.call("divergent_barrier", floats())
    test_threads_of_a_block_meet_at_a_barrier(probes)


def test_matrix_fragments_follow_the_instruction_set(probes: Emulator, rand: Rand) -> None:
    a, b, out = rounded(rand.normal(16, 16)), rounded(rand.normal(8, 16)), floats(128).reshape(16, 8)
    probes.call("product", to_bf16(a), to_bf16(b), out)
    assert_close(out, a.astype(np.float64) @ b.T, 1e-5)


def test_transposing_loads_transpose(probes: Emulator, rand: Rand) -> None:
    matrices, out = rounded(rand.normal(4, 8, 8)), np.zeros((4, 8, 8), np.uint16)
    probes.call("transpose", to_bf16(matrices), out)
    assert_same_bits(from_bf16(out), np.ascontiguousarray(matrices.transpose(0, 2, 1)))


def test_warp_operations_give_what_the_manual_says(probes: Emulator) -> None:
    values, out = np.arange(32, dtype=np.int32), np.zeros((32, 7), np.int32)
    probes.call("warp_operations", values, out)
    assert (out[:, 0].view(np.uint32) == 0xFFFFF800).all()
    assert (out[:, 1] == 1).all() and (out[:, 2] == 1).all()
    assert (out[:, 3] == 496).all() and (out[:, 4] == 31).all()
    assert (out[:, 5] == (values + 1) % 32).all()
    assert (out[:, 6] == values // 8 * 8).all()


@pytest.mark.parametrize("num_blocks", [1, 2, 33])
def test_the_last_block_sees_what_all_have_written(probes: Emulator, num_blocks: int) -> None:
    counter, parts, total = (np.zeros(n, np.uint32) for n in (1, num_blocks, 1))
    probes.call("tickets", counter, parts, total, num_blocks)
    assert total[0] == num_blocks * (num_blocks + 1) // 2


ADDRESS_SANITIZER_SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from cuda_ops.emulator import Emulator, library_path
probes = Emulator(library_path([Path(sys.argv[1])], "probes"))
out = np.zeros(64, np.float32)
probes.call("block_sum", np.arange(64, dtype=np.float32), out, False)
assert out[0] == 2016
print("right kernel passed", flush=True)
probes.call("past_the_end", np.zeros(1 << 14, np.float32)[-32:], out, 1)
"""


def test_address_sanitizer_follows_the_fibers() -> None:
    runtime = address_sanitizer_runtime()
    if runtime is None:
        pytest.skip("the compiler has no AddressSanitizer runtime")
    environment = {
        **os.environ,
        "LD_PRELOAD": str(runtime),
        "OCTET_EMULATOR_SANITIZE": "address",
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
    }
    finished = subprocess.run(
        [sys.executable, "-c", ADDRESS_SANITIZER_SCRIPT, str(HERE / "probes.cu")],
        env=environment, capture_output=True, text=True, timeout=120, cwd=HERE.parents[2],
    )  # fmt: skip
    assert "right kernel passed" in finished.stdout, finished.stderr
    assert finished.returncode != 0
    assert "heap-buffer-overflow" in finished.stderr and "past_the_end_kernel" in finished.stderr, (
        finished.stderr
    )

"""What the workers ask of a device, on the CPU of each framework."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from engine.config import ServerConfig
from tests.checks import assert_same_bits
from tests.conftest import Rand
from tests.workers.engine_side import ROOT
from tests.workers.ranks import RankThreads
from workers.device import open_device
from workers.device.bfloat16 import bits_from_float32, float32_from_bits
from workers.device.host import HostDevice
from workers.device.paddle import PaddleCpu
from workers.model.workspace import Workspace


@pytest.fixture(params=["paddle", "torch"])
def framework(request: pytest.FixtureRequest) -> type[HostDevice]:
    if request.param == "paddle":
        return PaddleCpu
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from workers.device.torch import TorchCpu

    return TorchCpu


@pytest.fixture
def device(framework: type[HostDevice]) -> HostDevice:
    return framework()


def test_every_bfloat16_survives_the_way_through_the_device(device: HostDevice):
    bits = np.arange(65536, dtype=np.uint16)
    bits = bits[np.isfinite(float32_from_bits(bits))]
    values = device.download(device.upload(bits, "bfloat16"))
    assert_same_bits(values, float32_from_bits(bits))
    assert_same_bits(bits_from_float32(values), bits)


def test_fp32_becomes_the_nearest_bfloat16_with_ties_to_even():
    halfway = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3e38, np.inf, np.nan], np.float32)
    rounded = float32_from_bits(bits_from_float32(halfway))
    assert rounded[:3].tolist() == [1.0, 1 + 2**-6, -1.0]
    assert np.isfinite(rounded[3]) and rounded[4] == np.inf and np.isnan(rounded[5])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "float32"])
def test_arrays_come_back_as_they_went(device: HostDevice, rand: Rand, dtype: str):
    array = rand.numpy.integers(0, 100, (3, 5)).astype(dtype)
    assert_same_bits(device.download(device.upload(array)), array)


def test_wrong_type_is_refused_and_not_converted(device: HostDevice):
    with pytest.raises(TypeError, match="cannot upload int64 as int32"):
        device.upload(np.zeros(3, np.int64), "int32")
    with pytest.raises(TypeError, match="uint16"):
        device.upload(np.zeros(3, np.uint16))


def test_view_and_slice_share_memory(device: HostDevice):
    tensor = device.upload(np.zeros((4, 6), np.float32))
    device.add(device.view(tensor, (8, 3))[2:4], device.upload(np.ones((2, 3), np.float32)))
    expected = np.zeros((4, 6), np.float32)
    expected[1] = 1
    assert_same_bits(device.download(tensor), expected)


def test_view_of_nothing_keeps_the_shape(device: HostDevice):
    assert list(device.view(device.empty((0, 6), "float32"), (0, 2, 3)).shape) == [0, 2, 3]


def test_bfloat16_sum_is_rounded_once(device: HostDevice, rand: Rand):
    x, y = (float32_from_bits(bits_from_float32(rand.normal(5000, 3))) for _ in range(2))
    total = device.upload(x, "bfloat16")
    device.add(total, device.upload(y, "bfloat16"))
    assert_same_bits(device.download(total), float32_from_bits(bits_from_float32(x + y)))


def test_collectives_do_nothing_for_one_rank(device: HostDevice, rand: Rand):
    array = rand.normal(4, 2)
    tensor, out = device.upload(array), device.empty((1, 4, 2), "float32")
    device.all_reduce(tensor)
    device.broadcast(tensor, 0)
    device.all_gather(tensor, out)
    device.barrier()
    assert_same_bits(device.download(tensor), array)
    assert_same_bits(device.download(out)[0], array)


def test_ranks_sum_gather_and_broadcast(rand: Rand, framework: type[HostDevice]):
    arrays = [rand.normal(3, 2) for _ in range(3)]

    def on_rank(device: HostDevice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        total, shared = (device.upload(arrays[device.rank]) for _ in range(2))
        gathered = device.empty((3, 3, 2), "float32")
        device.all_gather(total, gathered)
        device.all_reduce(total)
        device.broadcast(shared, 1)
        return device.download(total), device.download(gathered), device.download(shared)

    for total, gathered, shared in RankThreads(3, framework).run(on_rank):
        assert_same_bits(total, arrays[0] + arrays[1] + arrays[2])
        assert_same_bits(gathered, np.stack(arrays))
        assert_same_bits(shared, arrays[1])


def test_tensor_of_a_mapped_file_is_its_memory(device: HostDevice, rand: Rand):
    pages = np.frombuffer(bytearray(4096), np.uint8)
    start = -pages.ctypes.data % 64
    bits = pages[start : start + 64].view(np.uint16)
    bits[:] = bits_from_float32(rand.normal(32))
    tensor = device.adopt(bits, "bfloat16")
    assert_same_bits(device.download(tensor), float32_from_bits(bits))
    assert device.host_bits(tensor).ctypes.data == bits.ctypes.data


def test_arrays_that_travel_together_arrive_apart(device: HostDevice, rand: Rand):
    arrays = [rand.numpy.integers(0, 100, shape, np.int32) for shape in ((3, 7), (0,), (1,), (5,))]
    before = [array.copy() for array in arrays]
    tensors = device.upload_all(arrays)
    for array in arrays:
        array += 1  # copies do not notice
    for tensor, array in zip(tensors, before, strict=True):
        assert_same_bits(device.download(tensor), array)


def test_memory_is_counted_in_bytes(device: HostDevice):
    assert 0 < device.free_memory() <= device.total_memory()


def test_rank_does_not_load_pytorch():
    """tvm_ffi would, wherever PyTorch is installed."""
    code = "import workers.worker, workers.device.paddle, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_workspace_gives_the_same_memory_for_the_same_name(device: HostDevice):
    workspace = Workspace(device)
    large = workspace.take("x", (4, 8), "float32")
    assert workspace.take("x", (4, 8), "float32") is large
    small = workspace.take("x", (2, 4), "float32")
    assert (list(small.shape), small.data_ptr()) == ([2, 4], large.data_ptr())
    assert workspace.take("x", (4, 8), "bfloat16").data_ptr() != large.data_ptr()
    assert workspace.take("y", (4, 8), "float32").data_ptr() != large.data_ptr()


def test_flag_chooses_the_framework_on_a_cpu(framework: type[HostDevice]):
    name = "torch" if framework is not PaddleCpu else "paddle"
    assert type(open_device(ServerConfig(framework=name), 0, lambda: None)) is framework  # type: ignore[arg-type]

"""The GPU device of each framework on a fake libcuda: memory, copies, recorded work, ranks, failures."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cuda_ops
from engine.config import ServerConfig
from engine.errors import ConfigError, EngineError
from tests.checks import assert_close, assert_same_bits
from tests.conftest import Rand
from tests.workers.fake_collectives import FakeNcclLibrary, LoneHost
from tests.workers.fake_cuda import FakeCuda, FakePaddleGpu, streamed_ops, torch_gpu
from workers.device import open_gpu, paddle_gpu
from workers.device.base import Device
from workers.device.bfloat16 import bits_from_float32, float32_from_bits
from workers.device.driver import Driver
from workers.device.gpu import GpuDevice
from workers.device.nccl import Nccl
from workers.device.op_watch import checked, watched_ops
from workers.device.paddle import PaddleCpu
from workers.device.paddle_gpu import PaddleGpu
from workers.device.staging import Uploads


@pytest.fixture
def stream() -> Iterator[None]:
    with streamed_ops():
        yield


@pytest.fixture(params=["paddle", "torch"])
def device(request: pytest.FixtureRequest, stream: None) -> Any:
    return (FakePaddleGpu if request.param == "paddle" else torch_gpu())()


# memory and copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "float32"])
def test_arrays_come_back_as_they_went(device: GpuDevice, rand: Rand, dtype: str):
    array = rand.numpy.integers(0, 100, (3, 5)).astype(dtype)
    assert_same_bits(device.download(device.upload(array)), array)
    assert_same_bits(device.host_bits(device.adopt(array, dtype)), array)  # type: ignore[arg-type]


def test_bfloat16_goes_as_bits_and_comes_as_fp32(device: GpuDevice, rand: Rand):
    values = rand.normal(4, 3)
    tensor = device.upload(values, "bfloat16")
    assert_same_bits(device.download(tensor), float32_from_bits(bits_from_float32(values)))
    assert_same_bits(device.host_bits(tensor), bits_from_float32(values))


def test_array_may_change_as_soon_as_it_was_uploaded(device: GpuDevice, rand: Rand):
    array = rand.normal(100)
    expected, tensor = array.copy(), device.upload(array)
    array[:] = 0
    assert_same_bits(device.download(tensor), expected)


def test_download_shows_the_tensor_as_it_was_when_it_began(device: GpuDevice, rand: Rand):
    first, second = rand.normal(8), rand.normal(8)
    tensor = device.upload(first)
    download = device.download_later(tensor)
    device.write(tensor, second)
    assert not download.is_done()
    assert_same_bits(download.result(), first)
    assert_same_bits(device.download(tensor), second)


def test_arrays_that_travel_together_arrive_apart_and_aligned(device: GpuDevice, rand: Rand):
    arrays = [rand.numpy.integers(0, 100, shape, np.int32) for shape in ((3, 7), (0,), (1,), (5,))]
    tensors = device.upload_all(arrays)
    for tensor, array in zip(tensors, arrays, strict=True):
        assert_same_bits(device.download(tensor), array)
    assert all(tensor.data_ptr() % 256 == 0 for tensor in tensors if 0 not in tensor.shape)


def test_corner_leaves_the_rest_as_it_is(device: GpuDevice):
    tensor = device.upload(np.full((4, 5), 9, np.int32))
    device.write_corner(tensor, np.arange(6, dtype=np.int32).reshape(2, 3))
    assert device.download(tensor)[:3].tolist() == [[0, 1, 2, 9, 9], [3, 4, 5, 9, 9], [9] * 5]


def test_wrong_shapes_types_and_layouts_are_refused(device: GpuDevice):
    tensor = device.zeros((2, 3), "float32")
    with pytest.raises(ValueError, match="cannot write"):
        device.write(tensor, np.zeros((3, 2), np.float32))
    with pytest.raises(TypeError, match="cannot upload int64 as int32"):
        device.upload(np.zeros(3, np.int64), "int32")
    with pytest.raises(ValueError, match="not contiguous"):
        device.download(device.zeros((2, 3), "float32")[:, 1:2])


def test_upload_larger_than_the_pinned_buffer_waits_only_for_the_half_it_needs(rand: Rand):
    cuda = FakeCuda()
    driver = Driver(0, cuda)
    driver.enter()
    uploads = Uploads(driver, 7, half=1024)
    target, array = np.zeros(5000, np.uint8), rand.numpy.integers(0, 256, 5000, np.uint8)
    uploads.send(array, target.ctypes.data)
    assert cuda.num_queued() > 0, "the last pieces are still on their way"
    driver.wait_for_stream(7)
    assert_same_bits(target, array)
    uploads.close()


def test_memory_is_what_the_driver_says(device: GpuDevice):
    assert (device.free_memory(), device.total_memory()) == (1 << 28, 1 << 30)
    assert device.name == "gpu:0 Fake H800" and device.is_gpu


# arithmetic ---------------------------------------------------------------------------------------------


def test_plain_weight_is_multiplied_by_the_framework_then_biased(device: GpuDevice, rand: Rand):
    x, weight, bias = rand.normal(3, 16), rand.normal(8, 16), rand.normal(8)
    out = device.empty((3, 8), "bfloat16")
    matrix = cuda_ops.Weight("bfloat16", device.upload(weight, "bfloat16"))
    device.linear(
        device.upload(x, "bfloat16"), matrix, out, bias=device.upload(bias, "bfloat16"), activation="gelu"
    )
    product = x @ weight.T + bias
    expected = 0.5 * product * (1 + np.vectorize(math.erf)(product / 2**0.5))
    assert_close(device.download(out), expected.astype(np.float32), 0.1)


def test_paddles_own_product_is_x_times_the_transposed_weight(rand: Rand):
    """On fp32, because Paddle multiplies no bf16 on a CPU; FakePaddleGpu uses NumPy for that."""
    x, weight = rand.normal(3, 16), rand.normal(8, 16)
    host = PaddleCpu()
    out, total = host.empty((3, 8), "float32"), host.upload(x)
    PaddleGpu._multiply(None, host.upload(x), host.upload(weight), out)  # type: ignore[arg-type]
    assert_close(host.download(out), x @ weight.T, 1e-5)
    PaddleGpu.add(None, total, host.upload(x))  # type: ignore[arg-type]
    assert_same_bits(host.download(total), x + x)


# recorded work ------------------------------------------------------------------------------------------


def test_recorded_work_is_done_at_each_replay_with_what_is_there_then(device: GpuDevice, rand: Rand):
    x, weight = device.upload(rand.normal(2, 8)), device.upload(np.ones(8, np.float32))
    out = device.zeros((2, 8), "float32")
    graph = device.capture(lambda: cuda_ops.rms_norm(x, weight, 1e-5, out))
    assert not device.download(out).any(), "recording does nothing yet"
    for _ in range(2):
        values = rand.normal(2, 8)
        device.write(x, values)
        graph.replay()
        expected = values / np.sqrt((values**2).mean(1, keepdims=True) + 1e-5)
        assert_close(device.download(out), expected, 1e-5)


@pytest.mark.parametrize(
    ("work", "what"),
    [
        (lambda device: device.upload(np.zeros(1, np.float32)), "an upload"),
        (lambda device: device.download(device.zeros((1,), "float32")), "a download"),
        (lambda device: device.synchronize(), "waiting"),
    ],
)
def test_recorded_work_may_not_copy_or_wait(device: GpuDevice, work: Callable[[Device], Any], what: str):
    with pytest.raises(EngineError, match=f"{what} cannot be part of recorded work"):
        device.capture(lambda: work(device))
    device.download(device.upload(np.zeros(1, np.float32)))  # and the stream is usable again


def test_closing_gives_graphs_and_pinned_memory_back(device: Any):
    device.capture(lambda: None)
    device.download(device.upload(np.zeros(3, np.float32)))
    device.close()
    assert not device.cuda._graphs and not device.cuda._pinned


# what is missing ----------------------------------------------------------------------------------------


def test_large_arrays_go_through_pinned_memory_that_is_not_kept(device: Any, rand: Rand):
    array = rand.numpy.integers(0, 100, (6 << 20) + 5).astype("int32")
    before = len(device.cuda._pinned)
    assert_same_bits(device.download(device.upload(array)), array)
    assert len(device.cuda._pinned) == before


@pytest.mark.parametrize("framework", ["paddle", "torch"])
def test_each_thread_makes_its_framework_and_the_ops_use_the_ranks_stream(
    framework: str, monkeypatch: pytest.MonkeyPatch
):
    """The real devices up to the calls that need CUDA, which are written down instead."""
    calls: list[tuple[Any, ...]] = []

    def noted(name: str, result: Any = None) -> Callable[..., Any]:
        return lambda *arguments: calls.append((name, *arguments)) or result

    if framework == "paddle":
        opened = SimpleNamespace(stream_base=SimpleNamespace(cuda_stream=41))
        monkeypatch.setattr(paddle_gpu.paddle.device, "set_device", noted("device"))
        monkeypatch.setattr(paddle_gpu.paddle.device, "current_stream", lambda place: opened)
        kind: type[GpuDevice] = PaddleGpu
        expected = [("device", "gpu:1")]
    else:
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        from workers.device.torch_gpu import TorchGpu

        opened = SimpleNamespace(cuda_stream=41)
        monkeypatch.setattr(torch.cuda, "Stream", lambda place: opened)
        monkeypatch.setattr(torch.cuda, "set_device", noted("device"))
        monkeypatch.setattr(torch.cuda, "set_stream", noted("stream"))
        kind = TorchGpu
        expected = [("device", torch.device("cuda:1")), ("stream", opened)]
    monkeypatch.setattr(cuda_ops, "set_stream", noted("ops"))
    monkeypatch.setattr(cuda_ops, "set_workspace", noted("workspace"))
    expected += [("ops", 41, 1), ("workspace", None)]
    device = kind(Driver(1, FakeCuda(2)), 1, 2)  # type: ignore[call-arg, arg-type]
    assert calls[-len(expected) :] == expected
    calls.clear()
    device.enter_thread()
    assert calls == [], "the same thread enters once"
    another = threading.Thread(target=device.enter_thread)
    another.start()
    another.join()
    assert calls == expected


def test_no_driver_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def nothing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", nothing)
    with pytest.raises(ConfigError, match="no NVIDIA driver here"):
        Driver(0)
    with pytest.raises(ConfigError, match="needs NCCL"):
        Nccl()


@pytest.mark.parametrize(
    ("cuda", "index", "sentence"),
    [
        (FakeCuda(init=999), 0, r"driver does not start \(CUDA error 999: .*see nvidia-smi"),
        (FakeCuda(count=2), 2, "rank 2 needs a GPU of its own, but 2 can be seen"),
        (FakeCuda(capability=(7, 5)), 0, r"Fake H800 has compute capability 7\.5, but the kernels need 8\.0"),
    ],
)
def test_unfit_gpu_is_one_sentence(cuda: FakeCuda, index: int, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        Driver(index, cuda)


@pytest.mark.parametrize("framework", ["auto", "paddle", "torch"])
def test_framework_without_cuda_is_one_sentence(framework: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("workers.device.paddle_gpu.has_cuda", lambda: False)
    if open_gpu.find_spec("torch"):
        monkeypatch.setattr("workers.device.torch_gpu.has_cuda", lambda: False)
    with pytest.raises(ConfigError, match=r"--device gpu needs .*(PaddlePaddle|PyTorch) built for CUDA"):
        open_gpu.gpu_class(framework)


def test_first_framework_with_cuda_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("workers.device.paddle_gpu.has_cuda", lambda: True)
    assert open_gpu.gpu_class("auto") is PaddleGpu
    pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setattr("workers.device.torch_gpu.has_cuda", lambda: True)
    assert open_gpu.gpu_class("torch").__name__ == "TorchGpu"
    monkeypatch.setattr("workers.device.paddle_gpu.has_cuda", lambda: False)
    assert open_gpu.gpu_class("auto").__name__ == "TorchGpu"


def test_out_of_memory_tells_what_is_free_and_what_was_wanted(device: Any, monkeypatch: pytest.MonkeyPatch):
    def full(shape: Any, dtype: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(device, "_allocate", full)
    with pytest.raises(
        EngineError, match=r"Fake H800 is out of memory: 0\.25 of 1\.00 GiB are free.*\(4 MiB more"
    ):
        device.empty((1024, 1024), "float32")
    device.cuda.failure = 2
    with pytest.raises(EngineError, match="gpu:0 Fake H800 is out of memory"):
        device.synchronize()


def test_kernel_that_failed_is_told_with_how_to_learn_its_name(device: Any):
    device.cuda.failure = 700
    with pytest.raises(EngineError, match=r"CUDA error 700: an illegal memory access.*OCTET_CHECK_OPS=1"):
        device.synchronize()
    with pytest.raises(EngineError, match="CUDA error 700"):
        device.download_later(device.upload(np.zeros(1, np.float32))).is_done()


def test_checked_ops_name_the_one_that_failed(device: Any):
    x, weight = device.upload(np.ones((1, 8), np.float32)), device.upload(np.ones(8, np.float32))
    with watched_ops(checked(device.synchronize)):
        cuda_ops.rms_norm(x, weight, 1e-5, x)
        device.cuda.failure = 700
        with pytest.raises(
            EngineError, match=r"the op rms_norm failed: gpu:0 Fake H800 failed: CUDA error 700"
        ):
            cuda_ops.rms_norm(x, weight, 1e-5, x)


def test_opening_a_gpu_joins_the_ranks_and_follows_the_flags(monkeypatch: pytest.MonkeyPatch, stream: None):
    monkeypatch.setattr(open_gpu, "Driver", lambda rank: FakeCuda(2))
    monkeypatch.setattr(open_gpu, "Nccl", lambda: Nccl(FakeNcclLibrary()))
    monkeypatch.setattr(open_gpu, "open_peers", lambda host, rank, world: None)
    monkeypatch.setattr(
        open_gpu, "gpu_class", lambda name: lambda cuda, rank, world: FakePaddleGpu(rank, world, None, cuda)
    )
    config = ServerConfig(device="gpu", tensor_parallel_size=2, gpu_graphs=False)
    device = open_gpu.open_gpu(config, 1, LoneHost)  # type: ignore[arg-type]
    assert (device.rank, device.world, device.can_record) == (1, 2, False)
    assert open_gpu.open_gpu(ServerConfig(device="gpu"), 0, lambda: None).can_record

    monkeypatch.setenv("OCTET_CHECK_OPS", "1")
    with pytest.MonkeyPatch.context() as stack:
        stack.setattr(open_gpu, "_until_exit", until := open_gpu.ExitStack())
        assert not open_gpu.open_gpu(ServerConfig(device="gpu"), 0, lambda: None).can_record
        until.close()

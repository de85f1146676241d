"""What is looked at before a weight is read, and the sentence when it is short."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine import preflight
from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.preflight import check_machine, check_room_for_shared_files, choose_device, visible_gpus


def test_cpu_ranks_get_the_memory_of_the_host():
    machine = check_machine(ServerConfig())
    assert machine.is_host and machine.available > 0


def test_full_shared_folder_is_named_with_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    space = os.statvfs(tmp_path)
    full = os.statvfs_result((4096, 4096, *space[2:4], 256, *space[5:]))  # 1 MiB left
    monkeypatch.setattr(preflight.os, "statvfs", lambda folder: full)
    with pytest.raises(ConfigError, match=r"1 MiB free.*need 72 MiB.*--shm-size"):
        check_room_for_shared_files(8, tmp_path)


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="this machine has a GPU")
def test_gpu_without_a_driver_is_one_sentence():
    with pytest.raises(ConfigError, match="no NVIDIA driver here"):
        check_machine(ServerConfig(device="gpu"))


@pytest.mark.parametrize(
    ("variable", "indices"),
    [(None, [0, 1, 2, 3]), ("2,3", [2, 3]), ("", []), ("7", []), ("GPU-aa,GPU-bb", [0, 1])],
)
def test_variable_says_which_gpus_count(variable: str | None, indices: list[int]):
    assert visible_gpus(variable, 4) == indices


class FakeNvml:
    """The driver's management library, for GPUs of these (capability, free MiB)."""

    def __init__(self, *gpus: tuple[tuple[int, int], int]) -> None:
        self.gpus = gpus

    def __call__(self, name: str) -> FakeNvml:  # as ctypes.CDLL
        return self

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlShutdown(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.gpus)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = index.value
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.free = 80 << 30, self.gpus[handle.value or 0][1] << 20
        return 0

    def nvmlDeviceGetName(self, handle: Any, name: Any, size: Any) -> int:
        name.value = b"Fake H800"
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = self.gpus[handle.value or 0][0]
        return 0


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it with the GPUs that there are, and whether a framework computes on them."""

    def have(*found: tuple[tuple[int, int], int], framework: bool = True) -> None:
        monkeypatch.setattr(preflight.ctypes, "CDLL", FakeNvml(*found))
        monkeypatch.setattr(preflight, "_has_gpu_framework", lambda: framework)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return have


def test_poorest_gpu_of_those_the_ranks_get_sets_the_plan(gpus: Callable[..., None]):
    gpus(((9, 0), 70_000), ((8, 0), 60_000), ((9, 0), 50_000))
    machine = check_machine(ServerConfig(device="gpu", tensor_parallel_size=2))
    assert (machine.name, machine.available >> 20, machine.is_host) == ("gpu:1 Fake H800", 60_000, False)


def test_too_few_and_too_old_gpus_are_one_sentence_each(gpus: Callable[..., None]):
    gpus(((9, 0), 70_000), ((7, 5), 60_000))
    with pytest.raises(ConfigError, match="--tensor-parallel-size 4 needs as many GPUs, but 2 can be seen"):
        check_machine(ServerConfig(device="gpu", tensor_parallel_size=4))
    with pytest.raises(ConfigError, match=r"gpu:1 Fake H800 has compute capability 7\.5.*need 8\.0 or newer"):
        check_machine(ServerConfig(device="gpu", tensor_parallel_size=2))


def test_auto_takes_gpus_where_there_are_enough_and_a_framework_for_them(gpus: Callable[..., None]):
    config = ServerConfig(tensor_parallel_size=2)
    gpus(((9, 0), 70_000), ((9, 0), 70_000))
    chosen, notes = choose_device(config)
    assert (chosen.device, chosen.dtype, len(notes)) == ("gpu", "bfloat16", 1)
    gpus(((9, 0), 70_000), ((9, 0), 70_000), framework=False)
    assert choose_device(config)[0].device == "cpu"
    gpus(((9, 0), 70_000))
    assert choose_device(config) == (msgspec.structs.replace(config, device="cpu"), [])


def test_gpus_do_not_compute_in_fp32():
    with pytest.raises(ConfigError, match="--dtype float32 is for CPUs"):
        choose_device(ServerConfig(device="gpu", dtype="float32"))


def test_gpus_read_int8_kv_in_blocks_of_at_least_eight_tokens():
    choose_device(ServerConfig(device="gpu", kv_cache_dtype="int8", block_size=8))
    choose_device(ServerConfig(device="cpu", kv_cache_dtype="int8", block_size=7))
    with pytest.raises(ConfigError, match="int8 needs --block-size 8 or more on GPUs, got 4"):
        choose_device(ServerConfig(device="gpu", kv_cache_dtype="int8", block_size=4))


def test_gpus_take_blocks_of_a_power_of_two():
    choose_device(ServerConfig(device="gpu", block_size=16))
    choose_device(ServerConfig(device="cpu", block_size=48))
    with pytest.raises(ConfigError, match="--block-size 48 is for CPUs: GPUs need a power of two"):
        choose_device(ServerConfig(device="gpu", block_size=48))

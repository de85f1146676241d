"""What is looked at before a weight is read, and the sentence when it is short."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine import preflight
from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.preflight import check_machine, check_room_for_shared_files, visible_gpus


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

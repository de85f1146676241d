"""Weights and KV caches lie in huge pages, and are tensors like any other."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import numpy as np
import pytest

from tests.checks import assert_same_bits
from workers import lasting_memory
from workers.device.base import DtypeName
from workers.device.paddle import PaddleCpu
from workers.lasting_memory import lasting

LARGE = (1024, 4096)


def flags_at(address: int) -> set[str]:
    """The kernel's flags of the mapping that holds the address."""
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(part, 16) for part in block.split(" ", 1)[0].split("-"))
        if start <= address < end:
            return set(block.rpartition("VmFlags:")[2].split())
    raise AssertionError(f"nothing is mapped at {address:x}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint8"])
def test_large_tensor_holds_what_is_written_to_it(dtype: DtypeName):
    device = PaddleCpu()
    tensor = lasting(device, LARGE, dtype)
    assert list(tensor.shape) == list(LARGE) and str(tensor.dtype).endswith(dtype)
    bits = device.host_bits(tensor)
    values = (np.arange(bits.size) % 251).astype(bits.dtype).reshape(LARGE)
    device.write(tensor, values)
    gc.collect()
    assert_same_bits(device.host_bits(tensor), values)
    assert_same_bits(device.host_bits(tensor[7]), values[7])


def test_large_tensor_starts_on_a_huge_page_and_asks_for_them():
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this kernel has no huge pages")
    tensor = lasting(PaddleCpu(), LARGE, "float32")
    assert tensor.data_ptr() % (2 << 20) == 0
    assert "hg" in flags_at(tensor.data_ptr())


def test_small_tensor_and_a_system_without_huge_pages_use_the_frameworks_memory(
    monkeypatch: pytest.MonkeyPatch,
):
    asked: list[tuple[int, ...]] = []
    device = PaddleCpu()
    monkeypatch.setattr(device, "empty", lambda shape, dtype: asked.append(tuple(shape)))
    lasting(device, LARGE, "float32")
    assert asked == []
    lasting(device, (4, 4), "float32")
    monkeypatch.setattr(lasting_memory, "_ADVICE", None)
    lasting(device, LARGE, "float32")
    assert asked == [(4, 4), LARGE]


def test_memory_is_given_back_with_its_last_tensor():
    device = PaddleCpu()
    view = lasting(device, LARGE, "float32")[5:9]
    gc.collect()
    address = view.data_ptr()
    assert "hg" in flags_at(address)  # a view keeps it
    del view
    gc.collect()
    with pytest.raises(AssertionError, match="nothing is mapped"):
        flags_at(address)

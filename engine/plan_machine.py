"""How much memory a machine has for a server: named devices, and the one this process runs on.

A GPU's memory belongs to one rank, a host's memory is shared by all ranks that compute on it. What is in
use already counts only for this machine. Driver and memory of real GPUs are asked for in preflight.py.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError

_MIB, _GIB = 1 << 20, 1 << 30

# MiB as the driver reports them, which is less than the name says.
_GPUS = {
    "a100-40g": 40960,
    "a100-80g": 81920,
    "a800-80g": 81920,
    "h100-80g": 81559,
    "h800-80g": 81559,
    "h20-96g": 97871,
    "h20-144g": 143771,
    "h200": 143771,
    "l20-48g": 46068,
    "l40s-48g": 46068,
    "rtx4090-24g": 24564,
}
_BY_SIZE = re.compile(r"(cpu|gpu)-(\d+)g")
# Outside the ranks: the engine, the api with its decoding processes, and room for the rest of the system.
_HOST_PROCESSES = 512 * _MIB
_HOST_RESERVE = 0.04  # of its memory
_CPU_RANK = 450 * _MIB  # of a rank's process before it holds a weight: interpreter, framework, ops
_GPU_RANK = 1536 * _MIB  # context, compiled kernels, collectives, fragmentation


@dataclass(frozen=True)
class Machine:
    """Memory in bytes: of one device, or of a host that all ranks share."""

    name: str
    memory: int
    is_host: bool
    available: int  # of `memory`, not in use by anything else

    def per_rank(self, world: int, utilization: float) -> int:
        """Bytes that one of `world` ranks may fill; `utilization` is the share of a GPU that is ours."""
        if self.is_host:
            return max(self.available - _HOST_PROCESSES - int(self.memory * _HOST_RESERVE), 0) // world
        return min(int(self.memory * utilization), self.available)

    @property
    def rank_process(self) -> int:
        """Bytes of a rank before it holds anything."""
        return _CPU_RANK if self.is_host else _GPU_RANK


def named_machine(name: str) -> Machine:
    """'a100-80g', 'cpu-24g', ...; an empty machine of that kind. Raises ConfigError listing the names."""
    if name in _GPUS:
        return Machine(name, _GPUS[name] * _MIB, is_host=False, available=_GPUS[name] * _MIB)
    if match := _BY_SIZE.fullmatch(name):
        memory = int(match[2]) * _GIB
        return Machine(name, memory, is_host=match[1] == "cpu", available=memory)
    raise ConfigError(
        f"--device {name} is not known; it can be {', '.join(_GPUS)}, or cpu-<GiB>g or gpu-<GiB>g "
        "for any size, as in cpu-24g"
    )


def this_host() -> Machine:
    """The memory of this machine, or of its container where that has a limit."""
    total, available = _meminfo("MemTotal"), _meminfo("MemAvailable")
    limit, used = _cgroup()
    if limit < total:
        total, available = limit, min(available, max(limit - used, 0))
    return Machine("this machine", total, is_host=True, available=available)


def _meminfo(field: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _cgroup(folder: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """(limit, used) of the container in bytes; files that the kernel can drop do not count as used."""
    try:
        limit, used = int((folder / "memory.max").read_text()), int((folder / "memory.current").read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit, used - int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):  # no cgroup v2 here, or "max"
        return 1 << 62, 0

"""How many threads a rank of a CPU server has, and which cores they stay on.

Where each rank has two cores or more to itself they are its own: Linux gives a page the memory beside the
core that touches it first, so a rank that stays reads its weights from its own socket, and its threads never
crowd another rank's. Where ranks have to share cores (`--tp 8` on a laptop) nobody is pinned, and the
scheduler lets the late ones catch up. The api and the engine run wherever there is room.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection
from pathlib import Path

from engine.config import ServerConfig

_FEWEST = 2  # cores of a rank that stays: on a single one it would wait for whoever else is sent there
_TOPOLOGY = Path("/sys/devices/system/cpu")


@functools.cache
def usable_cores() -> frozenset[int]:
    """What this process was started with; cores as Linux counts them, each hardware thread one."""
    return frozenset(os.sched_getaffinity(0))


def threads_per_rank(config: ServerConfig) -> int:
    """What `--cpu-threads` says, else the usable cores shared evenly, at least one."""
    return config.cpu_threads or max(len(usable_cores()) // config.tensor_parallel_size, 1)


def stay_on_own_cores(config: ServerConfig, rank: int) -> frozenset[int] | None:
    """Keep this thread, and those it starts from now on, on the rank's own cores; None if it has none."""
    cores = own_cores(rank, config.tensor_parallel_size, threads_per_rank(config), usable_cores())
    if cores is not None:
        os.sched_setaffinity(0, cores)
    return cores


def own_cores(
    rank: int, world: int, threads: int, usable: Collection[int], topology: Path = _TOPOLOGY
) -> frozenset[int] | None:
    """Neighbours on one socket where they divide; None for a single rank, or where there are too few."""
    size = len(usable) // world
    if world == 1 or size < max(_FEWEST, threads):
        return None
    in_order = sorted(usable, key=lambda core: (*_place(topology / f"cpu{core}/topology"), core))
    return frozenset(in_order[rank * size : (rank + 1) * size])


def _place(folder: Path) -> tuple[int, int]:
    """(socket, core) of a hardware thread; all alike where the system does not tell."""
    try:
        return int((folder / "physical_package_id").read_text()), int((folder / "core_id").read_text())
    except (OSError, ValueError):
        return 0, 0

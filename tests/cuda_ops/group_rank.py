"""One rank of a SharedMemoryGroup test: `python group_rank.py SCENARIO PATH RANK WORLD_SIZE TIMEOUT`.

Prints what happened as one JSON object; the test that started the ranks judges it.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import numpy as np

from cuda_ops import SharedMemoryGroup

SIZES = [0, 1, 5, 256, 4096, 4097, 70001]  # below, at and above the small limit, and over one slot


def part_of(rank: int, size: int) -> np.ndarray:
    return (np.random.default_rng(rank * 1000 + size % 1000).standard_normal(size) * 10.0**rank).astype(
        np.float32
    )


def collectives(group: SharedMemoryGroup) -> dict[str, Any]:
    """Every op at every size; True where the result is exactly the expected bits."""
    parts = {size: [part_of(r, size) for r in range(group.world_size)] for size in SIZES}
    results: dict[str, Any] = {}
    for size in SIZES:
        total = np.zeros(size, np.float32)
        for part in parts[size]:
            total = total + part  # rank order, fp32
        x = parts[size][group.rank].copy()
        group.all_reduce(x)
        gathered = np.full((group.world_size, size), np.nan, np.float32)
        group.all_gather(parts[size][group.rank], gathered)
        sent = parts[size][group.rank].copy()
        group.broadcast(sent, group.world_size - 1)
        results[str(size)] = [
            x.tobytes() == total.tobytes(),
            gathered.tobytes() == np.stack(parts[size]).tobytes(),
            sent.tobytes() == parts[size][-1].tobytes(),
        ]
    for _ in range(300):
        group.barrier()
    return results


def reduce_or_fail(group: SharedMemoryGroup) -> dict[str, Any]:
    group.all_reduce(np.ones(4, np.float32))
    return {}


def different_calls(group: SharedMemoryGroup) -> dict[str, Any]:
    x = np.ones(4, np.float32)
    if group.rank == 1:
        group.broadcast(x, 0)
    else:
        group.all_reduce(x)
    return {}


def give_up(group: SharedMemoryGroup) -> dict[str, Any]:
    """The last rank aborts; the others are waiting for it, or come later."""
    if group.rank == group.world_size - 1:
        group.abort()
        return {}
    group.barrier()
    return {}


def abort_own_wait(group: SharedMemoryGroup) -> dict[str, Any]:
    """A second thread of a waiting rank can end the wait: the call holds no interpreter lock."""
    if group.rank == 0:
        threading.Timer(0.05, group.abort).start()
        group.barrier()
    return {}


def absent(group: SharedMemoryGroup) -> dict[str, Any]:
    """Ranks 1 and 2 never call; the others wait for them."""
    if group.rank not in (1, 2):
        group.all_reduce(np.ones(4, np.float32))
    return {}


SCENARIOS = {
    function.__name__: function
    for function in (
        collectives,
        reduce_or_fail,
        different_calls,
        give_up,
        abort_own_wait,
        absent,
    )
}


def main(scenario: str, path: str, rank: str, world_size: str, timeout: str) -> None:
    try:
        group = SharedMemoryGroup(path, int(rank), int(world_size), float(timeout))
        print(json.dumps({"result": SCENARIOS[scenario](group)}))
        group.close()
    except RuntimeError as error:
        print(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    main(*sys.argv[1:])

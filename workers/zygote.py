"""`python -m workers <run_dir> <descriptors>`: imports once, then forks every rank of a CPU server.

Importing the framework costs over a second of CPU time, which eight ranks on a laptop would pay eight times.
This process pays once, forks while it has a single thread and nothing is open, prints the ranks' process ids
and ends; the engine adopts them (engine/forked_ranks.py). Not for GPUs: a driver that is initialised does not
survive a fork.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.channels import RunDirectory
from engine.process import await_adoption, begin_child, name_process

CANNOT_FORK = 3  # exit code: the engine starts each rank by itself


def main(run_directory: str, outputs: Sequence[int]) -> int:
    """Fork one rank per descriptor, which becomes its stdout and stderr. Returns the exit code.

    In a rank this does not return: the process serves and ends.
    """
    engine, forked_by = os.getppid(), os.getpid()
    begin_child("ranks")
    _keep_only(outputs)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy would start threads at import
    _import_all(RunDirectory(run_directory))
    if num_threads() != 1:
        return CANNOT_FORK
    gc.freeze()  # what is shared now stays shared: a collection would touch every object
    ranks = []
    for rank, output in enumerate(outputs):
        sys.stdout.flush()
        sys.stderr.flush()
        if not (pid := os.fork()):
            _speak_through(output, outputs)
            await_adoption(engine, forked_by)
            _be_rank(RunDirectory(run_directory), rank)
        ranks.append(pid)
    print(*ranks, flush=True)
    return 0


def _keep_only(descriptors: Sequence[int]) -> None:
    """Close what else was inherited: the engine reads our stdout until nobody holds it."""
    start = 3
    for descriptor in (*sorted(descriptors), os.sysconf("SC_OPEN_MAX")):
        os.closerange(start, descriptor)
        start = descriptor + 1


def num_threads() -> int:
    """Of this process; 0 where the system does not tell."""
    folder = Path("/proc/self/task")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def _import_all(run: RunDirectory) -> None:
    """What a rank would import first: the framework, in the order that open_device needs, and the ops."""
    import msgspec

    from cuda_ops import build
    from engine.config import read_config
    from workers import worker  # noqa: F401
    from workers.device import open_device

    config = msgspec.structs.replace(read_config(run.config), tensor_parallel_size=1)
    open_device(config, 0, lambda: None)
    build.library_path()


def _speak_through(output: int, outputs: Sequence[int]) -> None:
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    for descriptor in outputs:
        os.close(descriptor)


def _be_rank(run: RunDirectory, rank: int) -> None:
    from workers.__main__ import leave
    from workers.worker import Worker

    begin_child(f"rank {rank}")
    name_process(f"octet-rank-{rank}")
    leave(Worker(run, rank).serve())

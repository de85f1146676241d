"""Collectives between the ranks of one machine, through a shared mapping and futexes.

For CPU ranks: they sleep while they wait, so eight of them may share two cores. All ranks make the same calls
in the same order; a rank that does not come, or calls something else, is named in a RuntimeError.
"""

from __future__ import annotations

from os import PathLike, fspath

from cuda_ops.library import library
from cuda_ops.tensor import Tensor


class SharedMemoryGroup:
    """One rank's end of a group of `world_size` ranks.

    path     a file that does not exist yet, in memory-backed storage, the same on every rank; it is gone
             again when the constructor returns, so a crash leaves nothing behind
    timeout  seconds a call waits for the others, the constructor included
    """

    def __init__(self, path: str | PathLike[str], rank: int, world_size: int, timeout: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self._handle = int(library.group_open(fspath(path), rank, world_size, float(timeout)))

    def all_reduce(self, x: Tensor) -> None:
        """Replace x, fp32|bf16 of any shape, by the sum over ranks.

        Added in rank order in fp32 and rounded once, so every rank gets the same bits every time.
        """
        library.group_all_reduce(self._handle, x)

    def all_gather(self, x: Tensor, out: Tensor) -> None:
        """Write every rank's x to out[rank]; out is [world_size, ...] of x's shape and type."""
        library.group_all_gather(self._handle, x, out)

    def broadcast(self, x: Tensor, root: int) -> None:
        """Replace x by rank `root`'s x; any shape and type."""
        library.group_broadcast(self._handle, x, root)

    def barrier(self) -> None:
        """Return when every rank has come here."""
        library.group_barrier(self._handle)

    def abort(self) -> None:
        """Make every rank that waits, now or later, fail with an error naming this one. Any thread may."""
        library.group_abort(self._handle)

    def close(self) -> None:
        """Unmap the shared memory. The others notice nothing until they wait for this rank."""
        library.group_close(self._handle)

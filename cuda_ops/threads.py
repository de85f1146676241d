"""How many threads share the work of one op."""

from __future__ import annotations

from cuda_ops.library import library


def set_num_threads(num_threads: int) -> None:
    """Let `num_threads` threads, the calling one included, share each op. 1 runs everything inline.

    The number never changes a result. Threads sleep between calls, so ranks may share cores.
    """
    library.set_num_threads(num_threads)

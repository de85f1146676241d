"""The largest prefill that the engine may plan, computed once on a GPU before the first request.

Libraries load kernels at their first use, and buffers take their memory: so no request waits for either, and
where memory is short after all the server does not start, instead of failing under its first long prompt.
"""

from __future__ import annotations

import numpy as np

from workers.batch import HostBatch
from workers.gpu_memory import StepLimits


def largest_prefill(limits: StepLimits, num_blocks: int, block_size: int, num_pools: int) -> HostBatch:
    """One sequence in the first blocks, of as many tokens as a step may have; every other one is vision's."""
    count = min(limits.num_tokens, limits.num_sequence_tokens, num_blocks * block_size)
    index = np.arange(count, dtype=np.int32)
    return HostBatch(
        token_ids=np.zeros(count, np.int32),
        positions=np.tile(index, (3, 1)),
        slots=index,
        token_types=index % np.int32(max(num_pools, 1)),
        block_tables=np.arange(-(-count // block_size), dtype=np.int32)[None],
        query_starts=np.array([0, count], np.int32),
        kv_lens=np.array([count], np.int32),
        sample_rows=np.array([count - 1], np.int32),
    )

"""Who gives its blocks back when an older sequence needs them.

The cheapest: the fewest tokens to compute again for each block regained. With the prefix cache a victim loses
only what is overwritten, from its end on. A sequence that came back is spared until it has made progress.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.kv_manager import KVManager
from engine.sequence import Sequence


def choose_victim(
    kv: KVManager, candidates: Iterable[Sequence], num_short: int, spares_returned: bool
) -> Sequence | None:
    """The one of `candidates` to preempt when `num_short` blocks are missing; None if all are spared."""
    allowed = [one for one in candidates if not (spares_returned and one.must_advance)]
    if not allowed:
        return None
    return min(
        allowed, key=lambda one: (-one.priority, one.must_advance, _cost(kv, one, num_short), -one.seniority)
    )


def _cost(kv: KVManager, victim: Sequence, num_short: int) -> float:
    """Tokens to compute again per block that helps; infinite when others hold all of its blocks, too."""
    regained = min(kv.pool.num_owned_alone(victim.block_ids), num_short)
    if not regained:
        return float("inf")
    kept = (len(victim.block_ids) - regained) * kv.block_size if kv.caches_prefixes else 0
    return max(0, victim.num_computed_tokens - kept) / regained

"""What /debug/blocks and /debug/steps on the metrics port show: the scheduler's books, proven on the spot."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from engine.errors import EngineError
from engine.scheduler import Scheduler
from engine.step_log import describe_waiting

Page = Callable[[], dict[str, Any]]


def debug_pages(scheduler: Scheduler) -> dict[str, Page]:
    """Path to page; they must be made in the engine's thread, between two of its doings."""
    return {
        "/debug/blocks": lambda: describe_blocks(scheduler),
        "/debug/steps": lambda: describe_steps(scheduler, time.monotonic()),
    }


def describe_blocks(scheduler: Scheduler) -> dict[str, Any]:
    """Who holds how many blocks, and whether every block has exactly its owners."""
    try:
        scheduler.recount()
        error = ""
    except EngineError as wrong:
        error = str(wrong)
    pool, cache, swap = scheduler.kv.pool, scheduler.kv.cache, scheduler.kv.swap
    return {
        "consistent": not error,
        "error": error,
        "block_size": scheduler.kv.block_size,
        "num_blocks": pool.num_blocks,
        "num_used": pool.num_blocks - pool.num_free,
        "num_free": pool.num_free,
        "num_cached": len(cache),
        "num_evictions": cache.num_evictions,
        "host": {
            "num_blocks": swap.num_blocks,
            "num_used": len(swap),
            "num_saved": swap.num_saved,
            "num_returned": swap.num_returned,
            "copy_seconds": round(swap.copy_seconds, 9),  # of one block
            "recompute_seconds": round(scheduler.kv.recompute_seconds, 9),
        },
        "holders": [
            {
                "request": one.request_id,
                "blocks": len(one.block_ids),
                "alone": pool.num_owned_alone(one.block_ids),
                "tokens": one.num_tokens,
                "computed": one.num_computed_tokens,
                "cached": one.num_cached_tokens,
            }
            for one in scheduler.running
        ],
    }


def describe_steps(scheduler: Scheduler, now: float) -> dict[str, Any]:
    pacing = scheduler.pacing
    return {
        "target_seconds": pacing.target,
        "decode_seconds": round(pacing.decode_seconds, 6),
        "prompt_token_seconds": round(pacing.token_seconds, 9),
        "prompt_tokens_beside_answers": pacing.num_prefill_tokens,
        "waiting": describe_waiting(scheduler.waiting, now),
        **scheduler.log.describe(now),
    }

"""What is read from the scheduler when somebody fetches the metrics, under both sets of names.

Nothing here costs anything per step; what the step loop counts is in metrics.py.
"""

from __future__ import annotations

from engine.config import ServerConfig
from engine.metrics import Metrics
from engine.scheduler import Scheduler


def watch(metrics: Metrics, scheduler: Scheduler, config: ServerConfig, num_blocks: int) -> None:
    """Let `metrics` show how the scheduler stands."""
    metrics.describe(config, num_blocks)
    _watch_queue_and_blocks(metrics, scheduler, num_blocks)
    _watch_swap_tier(metrics, scheduler)
    _watch_by_reference_names(metrics, scheduler, config, num_blocks)


def _watch_queue_and_blocks(metrics: Metrics, scheduler: Scheduler, num_blocks: int) -> None:
    pool, cache = scheduler.kv.pool, scheduler.kv.cache
    for name, help, read in (
        ("num_requests_running", "sequences that compute", lambda: scheduler.num_running),
        ("num_requests_waiting", "sequences in the queue", lambda: scheduler.num_waiting),
        ("num_requests_preempted", "of them, those that wait to go on", lambda: scheduler.num_to_go_on),
        ("num_tenants", "tenants with a request", lambda: scheduler.accounts.num_active),
        ("kv_blocks_total", "KV blocks", lambda: num_blocks),
        ("kv_blocks_used", "KV blocks that a live sequence holds", lambda: num_blocks - pool.num_free),
        ("kv_blocks_cached", "KV blocks that a prompt may begin with", lambda: len(cache)),
    ):
        metrics.watch(name, help, read)
    metrics.watch_counter(
        "prefix_cache_evictions", "cached KV blocks that were overwritten", lambda: cache.num_evictions
    )


def _watch_swap_tier(metrics: Metrics, scheduler: Scheduler) -> None:
    swap = scheduler.kv.swap
    metrics.watch("swap_blocks_total", "places for KV blocks in host memory", lambda: swap.num_blocks)
    metrics.watch("swap_blocks_used", "KV blocks kept in host memory", lambda: len(swap))
    metrics.watch_counter("swapped_out_blocks", "KV blocks copied to host memory", lambda: swap.num_saved)
    metrics.watch_counter(
        "swapped_in_blocks", "KV blocks copied back from host memory", lambda: swap.num_returned
    )


def _watch_by_reference_names(
    metrics: Metrics, scheduler: Scheduler, config: ServerConfig, num_blocks: int
) -> None:
    names, pool, swap = metrics.reference_names(config.display_name), scheduler.kv.pool, scheduler.kv.swap
    most = config.max_num_seqs

    def returned_tokens() -> int:
        return swap.num_returned * config.block_size

    for name, help, read in (
        ("num_requests_running", "sequences that compute", lambda: scheduler.num_running),
        ("num_requests_waiting", "sequences in the queue", lambda: scheduler.num_waiting),
        ("num_requests_enqueued", "sequences in the queue", lambda: scheduler.num_waiting),
        ("num_requests_preempted", "of them, those that wait to go on", lambda: scheduler.num_to_go_on),
        ("batch_size", "sequences that compute", lambda: scheduler.num_running),
        ("max_batch_size", "sequences that may compute at once", lambda: most),
        ("available_batch_size", "sequences that may be added", lambda: most - scheduler.num_running),
        ("max_gpu_block_num", "KV blocks", lambda: num_blocks),
        ("free_gpu_block_num", "KV blocks that no sequence holds", lambda: pool.num_free),
        ("available_gpu_block_num", "KV blocks that no sequence holds", lambda: pool.num_free),
        ("gpu_cache_usage_perc", "share of KV blocks held", lambda: 1 - pool.num_free / num_blocks),
        ("available_gpu_resource", "share of KV blocks not held", lambda: pool.num_free / num_blocks),
        (
            "gpu_hit_token_rate",
            "share of prompt tokens that were cached on the device",
            lambda: max(0.0, metrics.hit_rate() - metrics.share_of_prompts(returned_tokens())),
        ),
        (
            "cpu_hit_token_rate",
            "share of prompt tokens that came back from host memory",
            lambda: metrics.share_of_prompts(returned_tokens()),
        ),
    ):
        names.gauge(name, help, read)
    names.counter(
        "prefix_cpu_cache_token_num", "prompt tokens that came back from host memory", returned_tokens
    )
    names.counter("requests_number", "requests that came", lambda: scheduler.num_requests)
    names.info(
        "cache_config_info",
        "settings of the KV cache",
        {
            "block_size": str(config.block_size),
            "num_gpu_blocks": str(num_blocks),
            "num_cpu_blocks": str(swap.num_blocks),
            "enable_prefix_caching": str(config.enable_prefix_caching),
            "max_num_seqs": str(config.max_num_seqs),
            "max_model_len": str(config.max_model_len),
        },
    )

"""What the operator chose: one frozen struct, read by every process.

flags.py turns a command line into it; the supervisor writes it to the run directory as JSON and its
children read it from there, so that no process parses flags twice. The model's own numbers are in
model_config.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

Quantization = Literal["auto", "bfloat16", "wint8", "wint4", "wint4-all"]
Dtype = Literal["auto", "bfloat16", "float32"]
KvCacheDtype = Literal["auto", "bfloat16", "int8"]


class ServerConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    """All settings of one server; sizes in tokens, bytes or seconds as named."""

    # model
    model: str = ""  # a folder, resolved before the children start; hub ids never reach them
    served_model_name: str = ""
    load_format: Literal["auto", "dummy"] = "auto"
    config_overrides: dict[str, Any] = {}
    dtype: Dtype = "auto"  # activations and unquantised weights; auto: the checkpoint's
    weight_cache: str = ""  # folder of final shards; "" until settled, "off" for none
    weight_cache_size: int = 0  # bytes of all entries; 0: what the disk has room for
    load_threads: int = 0  # per rank; 0: its share of the cores, at least two
    quantization: Quantization = "auto"  # until settled: the checkpoint's own, else bfloat16
    tokenizer: str = ""  # folder; the model's own if empty
    chat_template: str = ""  # file; the checkpoint's own if empty

    # public surface
    host: str = "0.0.0.0"
    port: int = 8000
    metrics_port: int = 8001
    api_keys: tuple[str, ...] = ()
    page: bool = True  # the chat page at /
    max_concurrency: int = 2048  # open requests; more get 429
    max_waiting: int = 1024  # requests waiting for the scheduler; more get 429
    reasoning_parser: str = ""
    max_body_bytes: int = 256 << 20
    drain_timeout: float = 20.0  # seconds that open requests may take to finish after SIGTERM

    # media
    limit_mm_per_prompt: dict[str, int] = msgspec.field(default_factory=lambda: {"image": 100, "video": 100})
    mm_processor_kwargs: dict[str, Any] = {}
    allowed_media_path: str = ""  # folder under which file: URLs may be read
    allow_private_media: bool = False  # let http(s) media come from private addresses
    media_timeout: float = 30.0  # seconds for one download
    max_media_bytes: int = 512 << 20  # of one encoded image or video
    media_workers: int = 0  # decoding processes; 0: half the cores, at least one

    # scheduler
    max_model_len: int = 0  # prompt + output; 0: the checkpoint's context
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 0  # tokens of one step; 0: 2048
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    overlap: bool = True  # plan the next step while the ranks compute
    target_itl_ms: float = 200.0  # from token to token beside prompts; 0: no bound
    max_prefill_tokens_per_step: int = 0  # 0: what the target allows
    max_encoder_tokens_per_step: int = 4096
    tenant_weights: dict[str, float] = {}  # shares of tenants that differ from 1
    block_size: int = 64
    gpu_memory_utilization: float = 0.9
    image_cache: int = 256 << 20  # bytes per rank of encoded images that no sequence needs; 0: none
    kv_cache_memory: int = 0  # bytes over all ranks; 0: what the memory plan leaves, see plan_server.py
    kv_cache_dtype: KvCacheDtype = "auto"  # auto: that of the activations
    swap_space: int = 0  # bytes of host memory over all ranks, for KV blocks that lose their place; 0: none
    kv_canary: bool = False  # ranks check that cached blocks hold what the engine says

    # ranks
    tensor_parallel_size: int = 1
    device: Literal["auto", "cpu", "gpu"] = "auto"
    framework: Literal["auto", "paddle", "torch"] = "auto"  # auto: Paddle, or PyTorch if only that has CUDA
    gpu_graphs: bool = True  # record decode steps and replay them
    cpu_threads: int = 0  # per rank; 0: cores / ranks, at least one
    rank_timeout: float = 10.0  # a rank silent for longer is treated as dead
    seed: int = 0

    offline: bool = False  # a hub id must be in the cache already

    # filled by the supervisor, not by flags
    run_directory: str = ""
    display_name: str = ""  # of the model, for people: what was typed, without its folders


def write_config(config: ServerConfig, path: Path) -> None:
    path.write_bytes(msgspec.json.encode(config))


def read_config(path: Path) -> ServerConfig:
    return msgspec.json.decode(path.read_bytes(), type=ServerConfig)

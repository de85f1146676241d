"""Every flag of the server: its names, the field of ServerConfig it sets, what it may be, what it does.

Only the table; flags.py parses a command line with it. Defaults are those of ServerConfig.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine import flag_values as values


@dataclass(frozen=True)
class Flag:
    """One flag with a value. `repeat`: may be given several times, each adds to a tuple."""

    names: tuple[str, ...]
    field: str
    parse: Callable[[str], Any]
    metavar: str
    help: str
    default_text: str = ""  # where the plain default would not say much
    repeat: bool = False


@dataclass(frozen=True)
class Switch:
    """--name and --no-name."""

    names: tuple[str, ...]
    field: str
    help: str


@dataclass(frozen=True)
class Ignored:
    """Accepted because the reference server has it, without effect here; `why` ends in its log line."""

    name: str
    why: str
    takes_value: bool = True


GROUPS: dict[str, tuple[Flag | Switch, ...]] = {
    "model": (
        Flag(("--model",), "model", values.text, "NAME",
             "a checkpoint folder in the -Paddle or -PT layout, a hub id (downloaded once), or, with "
             "--load-format dummy, a preset of models/presets; octet-tiny is a random one for tests",
             "the small trained model that comes with Octet"),
        Switch(("--offline",), "offline",
               "never touch the network; a hub id must have been downloaded before"),
        Flag(("--served-model-name",), "served_model_name", values.text, "NAME",
             "the name of the model in /v1/models and in answers", "the last part of --model"),
        Flag(("--load-format",), "load_format", values.choice(("auto", "dummy")), "FORMAT",
             "auto reads the checkpoint; dummy makes random weights of the right shapes from a config"),
        Flag(("--config-overrides",), "config_overrides", values.json_object, "JSON",
             "replace keys of config.json, as in '{\"num_hidden_layers\": 8}'", "none"),
        Flag(("--quantization", "--quant"), "quantization", values.quantization, "FORMAT",
             "format of the big weights: wint4 (routed experts int4, the rest int8), wint4-all (the rest "
             "int4, too: a fifth less to read per token, less accurate), wint8, or bfloat16 (also bf16, "
             "none) for unquantised", "the checkpoint's own, else bfloat16"),
        Flag(("--weight-cache",), "weight_cache", values.text, "FOLDER",
             "keeps the final weights of every rank, so that the next start maps them; off for none",
             "$OCTET_CACHE/weights, for models of at least 256 MiB that are read from files"),
        Flag(("--weight-cache-size",), "weight_cache_size", values.num_bytes, "SIZE",
             "the cache forgets what was used longest ago beyond this", "what leaves 5 % of the disk free"),
        Flag(("--load-threads",), "load_threads", values.integer(0, 256), "N",
             "threads of one rank that read and quantise weights", "its share of the cores, at least two"),
        Flag(("--dtype",), "dtype", values.choice(("auto", "bfloat16", "float32")), "TYPE",
             "type of activations and unquantised weights; auto takes the checkpoint's"),
        Flag(("--tokenizer",), "tokenizer", values.text, "FOLDER",
             "folder of tokenizer.model or tokenizer.json", "the model's own"),
        Flag(("--chat-template",), "chat_template", values.text, "FILE", "a Jinja chat template",
             "the checkpoint's own"),
        Flag(("--reasoning-parser",), "reasoning_parser", values.choice(("ernie-45-vl",)), "NAME",
             "how to tell reasoning from answer: ernie-45-vl", "chosen by the model"),
    ),
    "addresses": (
        Flag(("--host",), "host", values.text, "ADDRESS", "address that both ports listen on"),
        Flag(("--port",), "port", values.integer(1, 65535), "PORT", "the public port: the OpenAI API"),
        Flag(("--metrics-port",), "metrics_port", values.integer(1, 65535), "PORT",
             "Prometheus metrics, at /metrics"),
        Flag(("--api-key",), "api_keys", values.text, "KEY",
             "a key that requests must carry as 'Authorization: Bearer KEY'; may be given several times; "
             "also OCTET_API_KEY (comma-separated)", "none: everyone may ask", repeat=True),
        Switch(("--page",), "page", "serve the chat page at / of the public port"),
    ),
    "limits": (
        Flag(("--max-concurrency",), "max_concurrency", values.integer(1), "N",
             "open requests; more get 429"),
        Flag(("--max-waiting",), "max_waiting", values.integer(1), "N",
             "requests waiting for the scheduler; more get 429"),
        Flag(("--max-body-bytes",), "max_body_bytes", values.num_bytes, "SIZE",
             "largest request body, as in 256MiB; more gets 413"),
        Flag(("--drain-timeout", "--timeout-graceful-shutdown"), "drain_timeout", values.seconds, "SECONDS",
             "how long open requests may go on after SIGTERM or Ctrl-C"),
    ),
    "images and videos": (
        Flag(("--limit-mm-per-prompt",), "limit_mm_per_prompt", values.media_limits, "JSON",
             "how many of a kind one prompt may have, as in '{\"image\": 100, \"video\": 100}'"),
        Flag(("--mm-processor-kwargs",), "mm_processor_kwargs", values.processor_options, "JSON",
             "pixel and frame limits, as in '{\"image_max_pixels\": 4842768, \"video_fps\": 2}'",
             "the checkpoint's"),
        Flag(("--allowed-media-path",), "allowed_media_path", values.text, "FOLDER",
             "file: URLs may read below this folder", "none: file: URLs are refused"),
        Switch(("--allow-private-media",), "allow_private_media",
               "let http(s) URLs of media lead to private and loopback addresses"),
        Flag(("--media-timeout",), "media_timeout", values.seconds, "SECONDS", "for one download"),
        Flag(("--max-media-bytes",), "max_media_bytes", values.num_bytes, "SIZE",
             "largest encoded image or video, as in 512MiB"),
        Flag(("--media-workers",), "media_workers", values.integer(0), "N", "decoding processes",
             "half the cores, at least one"),
    ),
    "scheduler": (
        Flag(("--max-model-len",), "max_model_len", values.integer(0), "TOKENS",
             "prompt and answer of one request together", "the checkpoint's context"),
        Flag(("--max-num-seqs",), "max_num_seqs", values.integer(1, 4096), "N", "sequences that run at once"),
        Flag(("--max-num-batched-tokens",), "max_num_batched_tokens", values.integer(0), "TOKENS",
             "tokens computed in one step, over all sequences",
             "2048, or the whole context when chunked prefill is off"),
        Switch(("--enable-chunked-prefill",), "enable_chunked_prefill",
               "cut long prompts into chunks, so that running answers go on meanwhile"),
        Switch(("--enable-prefix-caching",), "enable_prefix_caching",
               "keep the KV blocks of finished requests, so that the next one with the same beginning, "
               "images included, need not compute it"),
        Switch(("--overlap",), "overlap",
               "plan and send the next step while the ranks compute, so that they never wait for the engine; "
               "an answer that ends by a stop token is noticed a step later, no token changes"),
        Flag(("--target-itl-ms",), "target_itl_ms", values.milliseconds, "MS",
             "time from token to token that running answers keep while prompts are computed; 0: no bound"),
        Flag(("--max-prefill-tokens-per-step",), "max_prefill_tokens_per_step", values.integer(0), "TOKENS",
             "prompt tokens of one step beside running answers, at most", "what --target-itl-ms allows"),
        Flag(("--max-encoder-tokens-per-step",), "max_encoder_tokens_per_step", values.integer(1), "TOKENS",
             "tokens of images and videos that one step encodes; one item is, however large"),
        Flag(("--tenant-weights",), "tenant_weights", values.weights, "JSON",
             "shares of tenants that differ from 1, as in '{\"key-a\": 2}'", "all alike"),
        Flag(("--block-size",), "block_size", values.integer(1, 1024), "TOKENS", "tokens of one KV block"),
        Flag(("--image-cache",), "image_cache", values.num_bytes, "SIZE",
             "memory of each rank for encoded images and video frames, so that the next turn or another "
             "request with the same picture need not encode it; 0: none", "256MiB"),
        Flag(("--gpu-memory-utilization",), "gpu_memory_utilization", values.fraction, "SHARE",
             "share of a GPU's memory for weights, activations and KV cache"),
        Flag(("--kv-cache-memory",), "kv_cache_memory", values.num_bytes, "SIZE",
             "KV cache of all ranks together, as in 4GiB", "what the memory plan leaves; on CPU at most what "
             "--max-num-seqs can use, and half of the free memory or 4 GiB"),
        Flag(("--kv-cache-dtype",), "kv_cache_dtype", values.choice(("auto", "bfloat16", "int8")), "TYPE",
             "type of keys and values in the KV cache: auto takes that of the activations; int8, with scales "
             "per token and head, holds nearly twice the tokens of bfloat16 in the same memory"),
        Flag(("--swap-space",), "swap_space", values.gibibytes, "GIB",
             "host memory of all ranks together for KV blocks that lose their place on the device, so that "
             "prompts and preempted sequences get them back by a copy where that is faster than computing "
             "them; needs the prefix cache. On CPU --kv-cache-memory is the better use of the same memory",
             "0"),
        Switch(("--kv-canary",), "kv_canary",
               "let the ranks check, whenever a prompt begins with cached blocks, that these were filled "
               "with its tokens; a difference ends the server instead of giving a wrong answer"),
    ),
    "ranks": (
        Flag(("--tensor-parallel-size", "--tp", "-tp"), "tensor_parallel_size", values.integer(1, 64), "N",
             "worker processes that share the model: GPUs, or processes on CPU"),
        Flag(("--device",), "device", values.choice(("auto", "cpu", "gpu")), "KIND",
             "where the ranks compute; auto takes GPUs when there are any"),
        Flag(("--framework",), "framework", values.choice(("auto", "paddle", "torch")), "NAME",
             "who gives tensors to the ranks; auto takes PaddlePaddle, or PyTorch where only that has CUDA"),
        Switch(("--gpu-graphs",), "gpu_graphs",
               "record decode steps on a GPU and replay them, so that a step costs the host one launch"),
        Flag(("--cpu-threads",), "cpu_threads", values.integer(0, 1024), "N", "threads of one rank on CPU; "
             "with two cores or more to itself, it stays on them", "cores / ranks, at least one"),
        Flag(("--rank-timeout",), "rank_timeout", values.seconds, "SECONDS",
             "a rank that shows no sign of life for longer counts as dead"),
        Flag(("--seed",), "seed", values.integer(0, 2**63 - 1), "N",
             "of the random weights of --load-format dummy"),
    ),
}  # fmt: skip

IGNORED: tuple[Ignored, ...] = (
    Ignored(
        "--enable-mm", "images and videos are on for every model that understands them", takes_value=False
    ),
    Ignored("--engine-worker-queue-port", "processes talk over private sockets, not ports"),
    Ignored("--cache-queue-port", "there is no cache process"),
    Ignored("--kv-cache-ratio", "prefill and decode share all KV blocks"),
    Ignored("--static-decode-blocks", "KV blocks are given on demand"),
    Ignored("--prealloc-dec-block-slot-num-threshold", "KV blocks are given on demand"),
    Ignored("--max-num-partial-prefills", "any number of prompts may be computed in chunks"),
    Ignored("--max-long-partial-prefills", "any number of prompts may be computed in chunks"),
    Ignored("--long-prefill-token-threshold", "any number of prompts may be computed in chunks"),
    Ignored("--workers", "one api process serves the public port"),
    Ignored("--use-warmup", "nothing needs warming up"),
    Ignored("--guided-decoding-backend", "answers can always be held to a form, by llguidance"),
    Ignored("--tool-call-parser", "calls are found in the one format that these models write"),
    Ignored("--enable-logprob", "log-probabilities are always available", takes_value=False),
)

"""What an operator can watch: Prometheus metrics of requests, steps, blocks and HTTP.

The step loop feeds them; gauges are read when someone looks, so they cost nothing per step. Served by
metrics_server.py, and a second time under other names by reference_metrics.py. Times in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily

from engine.config import ServerConfig
from engine.messages import RequestObserved, StepResult
from engine.outbox import Outbox
from engine.reference_metrics import ReferenceNames
from engine.sequence import Sequence

# Long prompts with videos take minutes to their first token: the buckets have to reach there.
_LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560)
_TOKEN_TIMES = (
    0.001,
    0.0025,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.06,
    0.08,
    0.1,
    0.15,
    0.25,
    0.5,
    1,
    2.5,
    10,
)
_STEP_TIMES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_COUNTS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 131072)


class Metrics:
    """Every metric of one server, in a registry of its own."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "requests that ended", ["finish_reason"])
        self._refused = self._counter("requests_refused", "requests that were not taken", ["status"])
        self._prompt_tokens = self._counter(
            "prompt_tokens", "prompt tokens of requests that got a first token"
        )
        self._generated = self._counter("generation_tokens", "generated tokens")
        self._preemptions = self._counter(
            "preemptions", "sequences that had to give their blocks back: to an older one, or by themselves",
            ["reason"],
        )  # fmt: skip
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "arrival to first token", _LATENCIES
        )
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "mean over one request, without its first token", _TOKEN_TIMES
        )
        self._latency = self._histogram("e2e_request_latency_seconds", "arrival to last token", _LATENCIES)
        self._queue = self._histogram("request_queue_time_seconds", "arrival to first scheduled", _LATENCIES)
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "first scheduled to first token", _LATENCIES
        )
        self._decode = self._histogram("request_decode_time_seconds", "first token to last", _LATENCIES)
        self._inference = self._histogram(
            "request_inference_time_seconds", "first scheduled to last token", _LATENCIES
        )
        self._encode = self._histogram(
            "request_encode_time_seconds", "in the vision tower, of requests with media", _LATENCIES
        )
        self._preempted = self._histogram(
            "request_preempted_time_seconds", "without blocks, of requests that were preempted", _LATENCIES
        )
        self._cached_tokens = self._counter(
            "prefix_cache_hit_tokens", "prompt tokens that came from the prefix cache"
        )
        self._cached_requests = self._counter(
            "prefix_cache_hit_requests", "requests of whose prompt some tokens came from the prefix cache"
        )
        self._max_tokens = self._histogram(
            "request_params_max_tokens", "tokens that one request asked for at most", _TOKEN_COUNTS
        )
        self._prompt_length = self._histogram("request_prompt_tokens", "of one request", _TOKEN_COUNTS)
        self._output_length = self._histogram("request_generation_tokens", "of one request", _TOKEN_COUNTS)
        self._steps = self._histogram("step_seconds", "plan sent to result received", _STEP_TIMES)
        self._step_tokens = self._histogram("step_tokens", "tokens computed in one step", _TOKEN_COUNTS)
        self._patches = self._counter("encoded_patches", "patches that went through the vision tower")
        self._cached_patches = self._counter(
            "cached_patches", "patches that need not, as their features were in the image cache"
        )
        self._encoding = self._counter("encode_seconds", "time in the vision tower")
        self._http = self._counter("http_requests", "HTTP requests", ["route", "status", "error_type"])
        self._http_seconds = self._histogram(
            "http_request_seconds", "whole HTTP request", _LATENCIES, ["route"]
        )
        self._media = self._counter("media_items", "images and videos in requests", ["kind"])
        self._media_seconds = self._histogram(
            "media_seconds", "fetch, decode and resize of one request", _LATENCIES
        )

    def watch(self, name: str, help: str, read: Callable[[], float]) -> None:
        """A gauge whose value is asked for when the metrics are fetched."""
        Gauge(f"octet:{name}", help, registry=self.registry).set_function(read)

    def watch_counter(self, name: str, help: str, read: Callable[[], float]) -> None:
        """A counter that someone else counts, asked for when the metrics are fetched."""
        self.registry.register(_ReadCounter(f"octet:{name}", help, read))  # type: ignore[arg-type]

    def reference_names(self, model: str) -> ReferenceNames:
        """Serve these metrics under the reference server's names, too; the caller adds its gauges."""
        names = ReferenceNames(model)
        names.copy(
            "request_success", self._requests, lambda labels: labels["finish_reason"] in ("stop", "length")
        )
        for name, source in (
            ("request_preempted", self._preemptions),
            ("prompt_tokens", self._prompt_tokens),
            ("generation_tokens", self._generated),
            ("prefix_cache_token_num", self._cached_tokens),
            ("prefix_gpu_cache_token_num", self._cached_tokens),
            ("time_to_first_token_seconds", self._first_token),
            ("time_per_output_token_seconds", self._per_token),
            ("e2e_request_latency_seconds", self._latency),
            ("request_queue_time_seconds", self._queue),
            ("request_prefill_time_seconds", self._prefill),
            ("request_decode_time_seconds", self._decode),
            ("request_inference_time_seconds", self._inference),
            ("request_prompt_tokens", self._prompt_length),
            ("request_generation_tokens", self._output_length),
            ("request_params_max_tokens", self._max_tokens),
        ):
            names.copy(name, source)
        names.gauge(
            "hit_token_rate", "share of prompt tokens that came from the prefix cache", self._hit_rate
        )
        self.registry.register(names)  # type: ignore[arg-type]
        return names

    def _hit_rate(self) -> float:
        prompts = self._prompt_tokens._value.get()
        return self._cached_tokens._value.get() / prompts if prompts else 0.0

    def describe(self, config: ServerConfig, num_blocks: int) -> None:
        """One series whose labels tell the settings that explain the other numbers."""
        labels = {
            "model": config.display_name,
            "quantization": config.quantization,
            "tensor_parallel_size": str(config.tensor_parallel_size),
            "block_size": str(config.block_size),
            "num_blocks": str(num_blocks),
        }
        Gauge("octet:engine_info", "settings", list(labels), registry=self.registry).labels(**labels).set(1)

    def observe_step(self, seconds: float, num_tokens: int, result: StepResult) -> None:
        self._steps.observe(seconds)
        self._step_tokens.observe(num_tokens)
        if result.num_encoded_patches:
            self._patches.inc(result.num_encoded_patches)
            self._encoding.inc(result.encode_seconds)
        if result.num_cached_patches:
            self._cached_patches.inc(result.num_cached_patches)

    def observe_outbox(self, outbox: Outbox) -> None:
        if outbox.num_generated_tokens:
            self._generated.inc(outbox.num_generated_tokens)
        for reason, count in outbox.preemptions.items():
            self._preemptions.labels(reason).inc(count)
        for status in outbox.refused:
            self._refused.labels(str(status)).inc()
        for sequence in outbox.started:
            self._prompt_tokens.inc(sequence.num_prompt_tokens)
            self._prefill.observe(sequence.first_token - sequence.first_scheduled)
            self._max_tokens.observe(sequence.sampling.max_tokens)
            if sequence.num_cached_tokens:
                self._cached_tokens.inc(sequence.num_cached_tokens)
                self._cached_requests.inc()
            self._first_token.observe(sequence.first_token - sequence.arrival)
            self._queue.observe(sequence.first_scheduled - sequence.arrival)
        for sequence in outbox.finished:
            self._observe_finished(sequence)

    def observe_http(self, seen: RequestObserved) -> None:
        self._http.labels(seen.route, str(seen.status), seen.error_type).inc()
        self._http_seconds.labels(seen.route).observe(seen.seconds)
        if seen.num_images:
            self._media.labels("image").inc(seen.num_images)
        if seen.num_videos:
            self._media.labels("video").inc(seen.num_videos)
        if seen.num_images or seen.num_videos:
            self._media_seconds.observe(seen.media_seconds)

    def _observe_finished(self, sequence: Sequence) -> None:
        self._requests.labels(sequence.finish_reason).inc()
        if not sequence.first_token:
            return
        self._prompt_length.observe(sequence.num_prompt_tokens)
        self._output_length.observe(sequence.num_output_tokens)
        if not sequence.last_token:
            return  # aborted or failed in the middle
        self._latency.observe(sequence.last_token - sequence.arrival)
        if sequence.media:
            self._encode.observe(sequence.encode_seconds)
        if sequence.num_preemptions:
            self._preempted.observe(sequence.preempted_seconds)
        self._decode.observe(sequence.last_token - sequence.first_token)
        self._inference.observe(sequence.last_token - sequence.first_scheduled)
        if sequence.num_output_tokens > 1:
            decoding = sequence.last_token - sequence.first_token
            self._per_token.observe(decoding / (sequence.num_output_tokens - 1))

    def _counter(self, name: str, help: str, labels: list[str] | None = None) -> Any:
        return Counter(f"octet:{name}", help, labels or [], registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple, labels: list[str] | None = None) -> Any:
        return Histogram(f"octet:{name}", help, labels or [], buckets=buckets, registry=self.registry)


class _ReadCounter:
    def __init__(self, name: str, help: str, read: Callable[[], float]) -> None:
        self._name, self._help, self._read = name, help, read

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._name, self._help, value=self._read())

"""How fast the CPU ops are, beside what this machine's memory and arithmetic units can do.

Method
    Every op is first checked against NumPy on the very tensors that are timed. Weights and KV caches rotate
    through copies that together exceed the last-level cache, so that each call reads memory. Times are the
    median of at least 7 calls and 0.3 s of them. Read bandwidth is that of cpu_limits.py; no arithmetic peak
    is assumed: GFLOP/s stand alone.
Bytes and flops
    linear              N*K*bits/8 + scales         2*M*N*K
    paged_attention     2*kv_len*nkv*hd*size        4*positions seen*nq*hd
    all_reduce          size of the message         -
How to read it
    The percentage is bytes per second over the measured read bandwidth: near 100 an op is as fast as memory,
    and beyond where several streams of one thread get more out of it than the plain read's one.
    Where flops decide (M = 512, prefill) look at GFLOP/s. Run it on a quiet machine; ranks of the all-reduce
    share the cores, as they do in `--tp 8` on a laptop.
Reference
    tests/bench/results/ops-*.json
Run
    python -m tests.bench.bench_ops [--threads N] [--only linear|attention|sampling|all_reduce] [--save]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import cuda_ops
from cuda_ops.pack import can_pack
from tests.bench.cpu_limits import ReadBandwidth
from tests.bench.result_files import heading, save, save_option
from tests.cuda_ops import references
from tests.cuda_ops.builders import make_weight, read, tensor, unwritten, values_of

CACHE_BYTES = 96 << 20  # copies of a weight together exceed this
ROOT = Path(__file__).parents[2]


class Source:
    """What make_weight and friends need of a test's `rand`, with one fixed seed."""

    def __init__(self) -> None:
        self.numpy = np.random.default_rng(1)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return (self.numpy.standard_normal(shape, np.float32) * scale).astype(np.float32)


def seconds_of(call: Callable[[int], Any]) -> float:
    """Median seconds of `call(i)`, where i counts up so that the caller can rotate through copies."""
    call(0)
    times: list[float] = []
    while len(times) < 7 or (sum(times) < 0.3 and len(times) < 2000):
        started = time.perf_counter()
        call(len(times) + 1)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


class Report:
    """Prints one line per measurement, and keeps its figures."""

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth
        self.figures: dict[str, dict[str, float]] = {
            "machine": {"read_gb_per_second": bandwidth / 1e9},
        }

    def line(self, what: str, seconds: float, num_bytes: float, flops: float = 0.0) -> None:
        rate = num_bytes / seconds
        work = f"{flops / seconds / 1e9:8.1f} GFLOP/s" if flops else " " * 16
        share = 100 * rate / self.bandwidth
        print(f"{what:<48}{seconds * 1e6:12.1f} us{rate / 1e9:9.2f} GB/s {share:5.0f} %{work}", flush=True)
        self.figures[what] = {"microseconds": seconds * 1e6, "gb_per_second": rate / 1e9}
        if flops:
            self.figures[what]["gflop_per_second"] = flops / seconds / 1e9


def check(actual: Any, expected: np.ndarray, what: str) -> None:
    error = np.abs(read(actual) - expected).max()
    limit = 0.02 * np.abs(expected).max()
    if not error <= limit:
        raise SystemExit(f"{what} is wrong: off by {error}, allowed {limit}")


def bench_linear(report: Report, source: Source) -> None:
    """The qkv projection of the 28B decoder, its quantised weights packed as a server packs them."""
    n, k = 3584, 2560
    for kind, dtype in (
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("int8", "bfloat16"),
        ("int4", "bfloat16"),
    ):
        weight, matrix = make_weight(source, kind, n, k, 64)
        if can_pack(weight.kind, n, k, weight.group):
            weight = cuda_ops.pack_panels(weight)
        copies = [weight] + [
            replace(weight, data=copy_of(weight.data)) for _ in range(CACHE_BYTES // weight.num_bytes)
        ]
        for m in (1, 16, 512):
            values = source.normal(m, k)
            x, out = tensor(values, dtype), unwritten((m, n), dtype)
            cuda_ops.linear(x, weight, out)
            check(out, references.linear(values_of(values, dtype), matrix, None, "none"), f"linear {kind}")

            def call(i: int, x: Any = x, out: Any = out, copies: list[Any] = copies) -> None:
                cuda_ops.linear(x, copies[i % len(copies)], out)

            report.line(
                f"linear {dtype} x {kind} M={m} {k}x{n}", seconds_of(call), weight.num_bytes, 2.0 * m * n * k
            )


def copy_of(data: Any) -> Any:
    return data.copy() if isinstance(data, np.ndarray) else data.clone()


def bench_attention(report: Report, source: Source) -> None:
    """The 28B decoder's heads: 20 query heads over 4 KV heads of 128."""
    nq, nkv, hd, block = 20, 4, 128, 64
    for dtype in ("float32", "bfloat16"):
        for kv_len, queries in ((512, 512), (4096, 512), (4096, 1), (32768, 1)):
            num_blocks = kv_len // block
            caches = [source.normal(num_blocks, nkv, block, hd) for _ in range(2)]
            num_bytes = 2 * kv_len * nkv * hd * (2 if dtype == "bfloat16" else 4)
            copies = [[tensor(cache, dtype) for cache in caches] for _ in range(CACHE_BYTES // num_bytes + 1)]
            values = source.normal(queries, nq, hd)
            q, out = tensor(values, dtype), unwritten((queries, nq * hd), dtype)
            table = np.arange(num_blocks, dtype=np.int32)[None]
            starts, lens = np.array([0, queries], np.int32), np.array([kv_len], np.int32)
            rest = (table, starts, lens, hd**-0.5, out)

            def call(i: int, q: Any = q, copies: list[Any] = copies, rest: Any = rest) -> None:
                cuda_ops.paged_attention(q, *copies[i % len(copies)], *rest)

            call(0)
            k, v = (values_of(c, dtype).transpose(0, 2, 1, 3).reshape(kv_len, nkv, hd) for c in caches)
            expected = references.attention(values_of(values[-1:], dtype), k, v, hd**-0.5, kv_len - 1)
            check(read(out)[-1:], expected.reshape(1, -1), "paged_attention")
            seen = queries * (kv_len - queries) + queries * (queries + 1) / 2
            what = f"paged_attention {dtype} {queries} queries, kv {kv_len}"
            report.line(what, seconds_of(call), num_bytes, 4.0 * seen * nq * hd)


def bench_sampling(report: Report, source: Source) -> None:
    """Rows of the full vocabulary: as even as those of random weights, and as a trained model's."""
    vocab = 103424
    for scale, what in ((1.0, "even"), (3.0, "uneven")):
        for rows in (1, 16):
            logits = source.normal(rows, vocab, scale=scale)
            for name, options in (
                ("greedy", {"temperature": 0.0}),
                ("temperature", {"temperature": 1.0}),
                ("top_k=50", {"temperature": 1.0, "top_k": 50}),
                ("top_p=0.8", {"temperature": 0.8, "top_p": 0.8}),
                ("min_p=0.1", {"temperature": 1.0, "min_p": 0.1}),
                ("20 logprobs", {"temperature": 0.0, "num_top": 20}),
            ):
                bench_sampler(report, f"{name}, {rows} rows, {what}", logits, **options)


def bench_sampler(report: Report, what: str, logits: np.ndarray, num_top: int = 0, **options: Any) -> None:
    rows, vocab = logits.shape
    batch = sampling_batch(rows, vocab, **options)
    ids, logprobs = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
    tops = np.zeros((rows, num_top), np.int32), np.zeros((rows, num_top), np.float32)
    work = logits.copy()

    def call(i: int) -> None:
        cuda_ops.sample_tokens(work, batch, ids, logprobs, *tops)

    call(0)
    expected = [references.log_softmax(row)[id] for row, id in zip(logits, ids, strict=True)]
    check(logprobs, np.array(expected), f"sample_tokens {what}")
    report.line(f"sample_tokens {what}", seconds_of(call), logits.nbytes)


def sampling_batch(
    rows: int, vocab: int, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> cuda_ops.SamplingBatch:
    def floats(value: float) -> np.ndarray:
        return np.full(rows, value, np.float32)

    none, starts, numbers = np.zeros(0, np.int32), np.zeros(rows + 1, np.int32), np.arange(rows)
    return cuda_ops.SamplingBatch(
        floats(temperature), np.full(rows, top_k, np.int32), floats(top_p), floats(min_p), floats(1),
        floats(0), floats(0), numbers, numbers, none, starts, np.zeros(rows, np.int32), none, starts,
        np.full(-(-vocab // 32), -1, np.int32),
    )  # fmt: skip


def bench_all_reduce(report: Report, world_size: int = 8) -> None:
    """Eight processes, however many cores there are."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        command = [sys.executable, "-m", "tests.bench.bench_ops", "--rank"]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), folder, str(world_size)], cwd=ROOT, stdout=subprocess.PIPE, text=True
            )
            for rank in range(world_size)
        ]
        outputs = [rank.communicate()[0] for rank in ranks]
    for line in outputs[0].splitlines():
        num_bytes, seconds = line.split()
        what = f"all_reduce {world_size} ranks, {num_bytes} bytes"
        report.line(what, float(seconds), float(num_bytes))


def all_reduce_rank(rank: int, folder: str, world_size: int) -> None:
    group = cuda_ops.SharedMemoryGroup(Path(folder) / "group", rank, world_size, 60)
    for size in (256, 2048, 65536, 1 << 20):
        x = np.full(size, rank + 1, np.float32)
        group.all_reduce(x)
        if not (x == world_size * (world_size + 1) / 2).all():
            raise SystemExit("all_reduce is wrong")
        calls = 2000 if size <= 2048 else 50
        group.barrier()
        started = time.perf_counter()
        for _ in range(calls):
            group.all_reduce(x)
        if rank == 0:
            print(4 * size, (time.perf_counter() - started) / calls, flush=True)
    group.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the CPU ops.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["linear", "attention", "sampling", "all_reduce"])
    parser.add_argument(
        "--rank", nargs=3, metavar=("RANK", "FOLDER", "WORLD_SIZE"), help="used by all_reduce"
    )
    save_option(parser)
    arguments = parser.parse_args()
    if arguments.rank:
        return all_reduce_rank(int(arguments.rank[0]), arguments.rank[1], int(arguments.rank[2]))
    cuda_ops.set_num_threads(arguments.threads)
    print(heading())
    report = Report(ReadBandwidth(arguments.threads)())
    print(f"read bandwidth {report.bandwidth / 1e9:.1f} GB/s")
    source = Source()
    parts = {
        "linear": lambda: bench_linear(report, source),
        "attention": lambda: bench_attention(report, source),
        "sampling": lambda: bench_sampling(report, source),
        "all_reduce": lambda: bench_all_reduce(report),
    }
    for name, part in parts.items():
        if arguments.only in (None, name):
            part()
    if arguments.save:
        save("ops", report.figures, {"threads": arguments.threads})
    return None


if __name__ == "__main__":
    main()

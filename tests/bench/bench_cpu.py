"""How fast a model of real layer shapes runs on this machine's CPU, beside what the machine can do.

Method        A3B-8L: the ERNIE-4.5-21B-A3B preset cut to 8 layers, random weights, through the workers'
              Runner in this process, one rank: everything a step does but the engine. Prompts are random
              tokens, sampling is greedy. Rounds of all measurements follow one another, so that a busy moment
              hits all of them; the best and the median of the rounds are reported. The arithmetic peak is a
              loop of vpdpbusd on registers, compiled here; read bandwidth is NumPy's maximum over 256 MiB.
Bytes         a decode step reads every dense weight, the head, and the experts that its tokens chose, each
              once (counted from the routing of an untimed step); KV is small beside them.
Flops         prefill of n tokens: 2 * n * active weights, without the head, which one row uses
How to read   share is bytes per second over the read bandwidth measured in the same round, near 100 being as
              fast as memory; for prefill operations over the int8 peak of the threads. On a busy machine
              both move: trust the best of the rounds.
Reference     tests/bench/results/cpu-*.json, one file per kept run with machine, date and commit
Run           ./run.sh bench cpu [--layers 8] [--quant wint4] [--threads N] [--rounds 5] [--save]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import cuda_ops
from cuda_ops import Weight, build
from engine.config import ServerConfig
from engine.messages import StepPlan, StepResult
from engine.model_config import ModelConfig, read_model_config
from engine.model_source import preset_file
from tests.bench.bench_ops import read_bandwidth
from tests.bench.result_files import heading, save, save_option
from tests.workers.builders import Prompt
from tests.workers.ranks import Driver
from workers.device import open_device
from workers.loader import load_weights
from workers.model.weights import DecoderWeights, DenseWeights, MoeWeights
from workers.quant import activation_dtype
from workers.runner import Runner

PRESET = "ernie-4.5-21b-a3b"
PROMPT = 512  # tokens of the prefill that is timed
DECODED_STEPS = 8  # per round and batch
BATCHES = (1, 8, 16)

_PEAK_LOOP = """
#include <immintrin.h>
extern "C" long run(long n) {
  __m512i sums[12], w = _mm512_set1_epi8(3), x = _mm512_set1_epi8(2);
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (long i = 0; i < n; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) sums[j] = _mm512_dpbusd_epi32(sums[j], w, x);
  }
  long total = 0;
  for (auto& sum : sums) total += _mm512_reduce_add_epi32(sum);
  return total;
}
"""


class OneRank:
    """A runner of the cut preset, as tests.workers.ranks.Driver wants its ranks."""

    block_size, num_blocks = 64, 512

    def __init__(self, layers: int, quantization: Any, folder: Path) -> None:
        config = ServerConfig(
            model=str(preset_file(PRESET)),
            quantization=quantization,
            load_format="dummy",
            weight_cache="off",
            config_overrides={"num_hidden_layers": layers},
        )
        self.model = read_model_config(config.model, config.config_overrides)
        device = open_device(config, 0, lambda *_: None)
        self.weights = load_weights(config, self.model, device, 0, 1)
        self._runner = Runner(
            self.model,
            self.weights,
            device,
            activation_dtype(config, self.model),
            folder,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
        )

    def run(self, plan: StepPlan) -> StepResult:
        return self._runner.run(plan)


class TouchedExperts:
    """While entered, adds up the bytes of the expert weights that each call of moe_experts must read."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def __enter__(self) -> TouchedExperts:
        self._op = cuda_ops.moe_experts
        cuda_ops.moe_experts = self._count
        return self

    def __exit__(self, *error: object) -> None:
        cuda_ops.moe_experts = self._op

    def _count(self, x: Any, ids: Any, routing: Any, pools: Any, out: Any) -> None:
        self._op(x, ids, routing, pools, out)
        num_experts = int(pools[0][0].data.shape[0])
        for expert in np.unique(np.asarray(ids.numpy())):
            if expert >= 0:
                self.num_bytes += (
                    sum(weight.num_bytes for weight in pools[expert // num_experts]) // num_experts
                )


def bytes_of(weights: DenseWeights | None) -> int:
    return weights.up_gate.num_bytes + weights.down.num_bytes if weights else 0


def dense_bytes(decoder: DecoderWeights) -> int:
    """What every step reads whatever its tokens are."""
    total = decoder.lm_head.num_bytes
    for layer in decoder.layers:
        total += layer.qkv.num_bytes + layer.o_proj.num_bytes
        if isinstance(layer.mlp, MoeWeights):
            total += bytes_of(layer.mlp.shared) + 4 * int(np.prod(layer.mlp.router.shape))
        else:
            total += bytes_of(layer.mlp)
    return total


def active_weights(model: ModelConfig, decoder: DecoderWeights) -> int:
    """Weights that one token meets, the head not counted."""

    def size(weight: Weight) -> int:
        return weight.out_features * weight.in_features

    total = 0
    for layer in decoder.layers:
        total += size(layer.qkv) + size(layer.o_proj)
        if isinstance(layer.mlp, MoeWeights):
            up_gate, down = layer.mlp.pools[0]
            total += model.moe_top_k * (size(up_gate) + size(down))
            total += size(layer.mlp.shared.up_gate) + size(layer.mlp.shared.down) if layer.mlp.shared else 0
        else:
            total += size(layer.mlp.up_gate) + size(layer.mlp.down)
    return total


def int8_peak() -> float | None:
    """Operations per second of one core's vpdpbusd; None where it has none."""
    if not frozenset((*build.AVX512, "avx512_vnni")) <= build.cpu_flags():
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.cc", Path(folder) / "peak.so"
        source.write_text(_PEAK_LOOP)
        flags = ["-O3", "-mavx512f", "-mavx512vnni", "-w", "-shared", "-fPIC"]
        subprocess.run([build.find_compiler(), *flags, str(source), "-o", str(library)], check=True)
        run = ctypes.CDLL(str(library)).run
        run.argtypes, run.restype = [ctypes.c_long], ctypes.c_long
        steps = 200_000
        return steps * 12 * 128 / min(seconds_of(lambda: run(steps)) for _ in range(50))


def seconds_of(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def random_prompt(numpy: np.random.Generator, length: int) -> Prompt:
    return Prompt(token_ids=numpy.integers(10, 100_000, length).tolist())


class Measurement:
    """Seconds of one kind of step, and what it must do at least."""

    def __init__(self, name: str, tokens: int, step: Callable[[], float]) -> None:
        self.name, self.tokens, self._step = name, tokens, step
        self.num_bytes, self.operations = 0.0, 0.0
        self.seconds: list[float] = []
        self.shares: list[float] = []

    def repeat(self, bandwidth: float, peak: float | None) -> None:
        seconds = self._step()
        self.seconds.append(seconds)
        if self.num_bytes:
            self.shares.append(self.num_bytes / seconds / bandwidth)
        elif peak:
            self.shares.append(self.operations / seconds / peak)

    def summary(self) -> dict[str, Any]:
        best = min(self.seconds)
        return {
            "tokens_per_second_best": round(self.tokens / best, 1),
            "tokens_per_second_median": round(self.tokens / statistics.median(self.seconds), 1),
            "seconds": [round(value, 5) for value in self.seconds],
            "bytes": int(self.num_bytes),
            "gb_per_second_best": round(self.num_bytes / best / 1e9, 2),
            "gop_per_second_best": round(self.operations / best / 1e9, 1),
            "share_of_peak_median": round(statistics.median(self.shares), 3) if self.shares else None,
        }


def decode(driver: Driver, seq_ids: list[int]) -> float:
    """Seconds of one decode step: the best of a few that follow one another."""
    return min(seconds_of(lambda: driver.step(dict.fromkeys(seq_ids, 1))) for _ in range(DECODED_STEPS))


def prefill(driver: Driver, numpy: np.random.Generator) -> float:
    seq_id = driver.add(random_prompt(numpy, PROMPT))
    seconds = seconds_of(lambda: driver.step({seq_id: PROMPT}))
    driver.drop(seq_id)
    return seconds


def make_measurements(rank: OneRank) -> list[Measurement]:
    driver, numpy = Driver(rank), np.random.default_rng(1)  # type: ignore[arg-type]
    made = []
    for batch in BATCHES:
        seq_ids = [driver.add(random_prompt(numpy, 32)) for _ in range(batch)]
        driver.generate(seq_ids, 2)
        with TouchedExperts() as touched:
            driver.step(dict.fromkeys(seq_ids, 1))
        one = Measurement(f"decode batch {batch}", batch, lambda ids=seq_ids: decode(driver, ids))
        one.num_bytes = dense_bytes(rank.weights.decoder) + touched.num_bytes
        one.operations = 2.0 * batch * active_weights(rank.model, rank.weights.decoder)
        made.append(one)
    whole = Measurement(f"prefill {PROMPT}", PROMPT, lambda: prefill(driver, numpy))
    whole.operations = 2.0 * PROMPT * active_weights(rank.model, rank.weights.decoder)
    return [*made, whole]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a model of real layer shapes on the CPU.")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--quant", default="wint4", choices=["wint4", "wint8", "bfloat16"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    save_option(parser)
    given = parser.parse_args()
    peak = int8_peak()
    print(f"{heading()}\n{PRESET}, {given.layers} layers, {given.quant}, random weights")
    cuda_ops.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(prefix="octet-cpu-") as folder:
        rank = OneRank(given.layers, given.quant, Path(folder))
        measurements = make_measurements(rank)
        bandwidths = []
        for _ in range(given.rounds):
            bandwidths.append(read_bandwidth(given.threads))
            for one in measurements:
                one.repeat(bandwidths[-1], peak and peak * given.threads)
    limits = {
        "read_gb_per_second": [round(value / 1e9, 1) for value in bandwidths],
        "int8_peak_gop_per_second_per_core": peak and round(peak / 1e9),
    }
    print(f"read bandwidth {limits['read_gb_per_second']} GB/s, int8 peak per core "
          f"{limits['int8_peak_gop_per_second_per_core']} GOP/s")  # fmt: skip
    for one in measurements:
        line = one.summary()
        share = "" if line["share_of_peak_median"] is None else f"{100 * line['share_of_peak_median']:6.0f} %"
        print(f"{one.name:<18}{line['tokens_per_second_best']:9.1f} tok/s best"
              f"{line['tokens_per_second_median']:9.1f} median{line['gb_per_second_best']:8.2f} GB/s"
              f"{line['gop_per_second_best']:9.1f} GOP/s{share}")  # fmt: skip
    if given.save:
        settings = {
            "preset": PRESET,
            "layers": given.layers,
            "quantization": given.quant,
            "threads": given.threads,
        }
        save("cpu", {"machine": limits} | {one.name: one.summary() for one in measurements}, settings)


if __name__ == "__main__":
    main()

"""How fast a model of real layer shapes runs on this machine's CPU, beside what the machine can do.

Method        A3B-8L: the ERNIE-4.5-21B-A3B preset cut to 8 layers, random weights, through the workers'
              Runner in this process, one rank: everything a step does but the engine. Prompts are random
              tokens, sampling is greedy, without log-probabilities. Rounds of all measurements follow one
              another, so that a busy moment hits all of them; the best and the median of the rounds are
              reported. A decode step counts as the best of a few that follow one another, with --busy as
              their mean. The arithmetic peak and the read bandwidth are those of cpu_limits.py.
Quiet         others on the same machine may take half of its memory for minutes, and two CPUs of a virtual
              machine may be one core for a while. So before a measurement the run waits, five minutes in all
              at most, until memory is read at 75 % of the run's best or more. A measurement before or after
              which it was not is kept in the file and left out of the figures, ours and the peer's alike, and
              made again, up to three times as many rounds in all; not so with --busy. Where not as many
              rounds as were asked for are quiet in the end, all count: few of the fastest would flatter.
Busy          --busy N runs N processes beside it that only count: what is left to a server that shares its
              cores. In proportion would be threads / (threads + N).
Peer          where llama-cpp-python and gguf are installed (pip install -e '.[bench]'), llama.cpp on a random
              Q4_0 model of the same shapes, with as many threads, measured after each of ours in each round.
              A ratio is our tokens per second over its. It reads 4.5 bits per weight and 6.6 of the head;
              ours are 4.25 for routed experts and 8 for the rest (wint4-all: 4.5).
Bytes         a decode step reads every dense weight, the head, and the experts that its tokens chose, each
              once (counted from the routing of an untimed step); KV is small beside them.
Flops         prefill of n tokens: 2 * n * active weights, without the head, which one row uses
How to read   share is bytes per second over the read bandwidth measured in the same round, near 100 being as
              fast as memory; for prefill operations over the int8 peak of the threads. On a busy machine
              both move: trust the best of the rounds.
Reference     tests/bench/results/cpu-*.json, one file per kept run with machine, date and commit
Run           ./run.sh bench cpu [--layers 8] [--quant wint4] [--threads N] [--rounds 5] [--busy N]
              [--no-peer] [--save]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import cuda_ops
from cuda_ops import Weight, build
from engine.config import ServerConfig
from engine.messages import SamplingParams, StepPlan, StepResult
from engine.model_config import ModelConfig, read_model_config
from engine.model_source import preset_file
from tests.bench.cpu_limits import ReadBandwidth, int8_peak
from tests.bench.llama_model import write_random_model
from tests.bench.llama_peer import LlamaPeer, missing_packages
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
QUIET = 0.75  # of the best read bandwidth of a run
MOST_WAITING = 300.0  # seconds of a run, for memory to be quiet
MOST_ROUNDS = 3  # times those that were asked for, where not all are quiet
BUSY_STEPS = 24  # some time slices of the scheduler
BATCHES = (1, 8, 16)
GREEDY = SamplingParams(max_tokens=1 << 20, temperature=0.0)


class OneRank:
    """A runner of the cut preset, as tests.workers.ranks.Driver wants its ranks."""

    block_size, num_blocks = 64, 128  # a few pages of memory, used before anything is timed, as the peer's

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
        started = time.perf_counter()
        result = self._runner.run(plan)
        self.seconds = time.perf_counter() - started  # of this step, without those who make its plan
        return result


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

    def _count(self, x: Any, ids: Any, routing: Any, pools: Any, out: Any, shared: Any = None) -> None:
        self._op(x, ids, routing, pools, out, shared)
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


def instructions() -> str:
    """The level that the ops are built for: "avx512", "avx2" or "generic"."""
    return build.choose_target(os.environ.get("OCTET_OPS_ISA") or None, build.cpu_flags()).isa


def random_prompt(numpy: np.random.Generator, length: int) -> Prompt:
    return Prompt(token_ids=numpy.integers(10, 100_000, length).tolist())


class Round(NamedTuple):
    """Read bandwidth before and after a measurement, bytes per second, and seconds of it."""

    bandwidths: tuple[float, float]
    seconds: float
    peer_seconds: float | None


class Measurement:
    """Seconds of one kind of step, ours and the peer's, and what it must do at least."""

    def __init__(self, kind: str, tokens: int, steps: int, is_busy: bool, step: Callable[[], float]) -> None:
        self.name = f"prefill {tokens}" if kind == "prefill" else f"{kind} batch {tokens}"
        self.kind, self.tokens, self._step = kind, tokens, step
        self._num_steps, self._combine = steps, statistics.mean if is_busy else min
        self.num_bytes, self.operations = 0.0, 0.0
        self.rounds: list[Round] = []

    def repeat(self, read_bandwidth: ReadBandwidth, before: float, peer: LlamaPeer | None) -> None:
        """`before` is the read bandwidth just measured."""
        seconds = self._combine([self._step() for _ in range(self._num_steps)])
        peers = peer.seconds(self.kind, self.tokens, self._num_steps) if peer else None
        self.rounds.append(
            Round((before, read_bandwidth()), seconds, self._combine(peers) if peers else None)
        )

    def quiet_rounds(self, bandwidth: float) -> list[Round]:
        """Those that had at least so much of the memory."""
        return [one for one in self.rounds if min(one.bandwidths) >= bandwidth]

    def make_figures(self, bandwidth: float, fewest: int, peak: float | None) -> None:
        """From the quiet rounds; from all where fewer than `fewest` are quiet."""
        rounds = self.quiet_rounds(bandwidth)
        if len(rounds) < fewest:
            rounds = self.rounds
        self.disturbed = [one for one in self.rounds if one not in rounds]
        self.seconds = [one.seconds for one in rounds]
        self.peer_seconds = [one.peer_seconds for one in rounds if one.peer_seconds is not None]
        self.shares = []
        if self.num_bytes:
            self.shares = [self.num_bytes / one.seconds / statistics.mean(one.bandwidths) for one in rounds]
        elif peak:
            self.shares = [self.operations / one.seconds / peak for one in rounds]

    def summary(self) -> dict[str, Any]:
        best = min(self.seconds)
        return {
            "tokens_per_second_best": round(self.tokens / best, 1),
            "tokens_per_second_median": round(self.tokens / statistics.median(self.seconds), 1),
            "seconds": [round(value, 5) for value in self.seconds],
            "disturbed_seconds": [round(one.seconds, 5) for one in self.disturbed],
            "disturbed_llama_cpp_seconds": [
                round(o.peer_seconds, 5) for o in self.disturbed if o.peer_seconds
            ],
            "bytes": int(self.num_bytes),
            "gb_per_second_best": round(self.num_bytes / best / 1e9, 2),
            "gop_per_second_best": round(self.operations / best / 1e9, 1),
            "share_of_peak_median": round(statistics.median(self.shares), 3) if self.shares else None,
            "llama_cpp_seconds": [round(value, 5) for value in self.peer_seconds],
            "ratio_to_llama_cpp": [round(ratio, 3) for ratio in self.ratios()],
        }

    def ratios(self) -> list[float]:
        """Our tokens per second over the peer's, per round, ascending."""
        return sorted(p / ours for p, ours in zip(self.peer_seconds, self.seconds, strict=False))

    def line(self) -> str:
        """For people."""
        best, median = min(self.seconds), statistics.median(self.seconds)
        text = f"{self.name:<16}{self.tokens / best:8.1f} tok/s best{self.tokens / median:8.1f} median"
        if self.num_bytes:
            text += f"{self.num_bytes / median / 1e9:7.1f} GB/s"
        else:
            text += f"{self.operations / median / 1e9:7.0f} GOP/s"
        if self.shares:
            text += f"{100 * statistics.median(self.shares):5.0f} %"
        if ratios := self.ratios():
            peer = self.tokens / statistics.median(self.peer_seconds)
            text += f"   llama.cpp{peer:8.1f} tok/s: x {statistics.median(ratios):.2f}"
            text += f" ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        return text


def decode(driver: Driver, seq_ids: list[int]) -> None:
    """One step."""
    driver.step(dict.fromkeys(seq_ids, 1))


def prefill(driver: Driver, numpy: np.random.Generator) -> None:
    seq_id = driver.add(random_prompt(numpy, PROMPT), GREEDY)
    driver.step({seq_id: PROMPT})
    driver.drop(seq_id)


def make_measurements(rank: OneRank, is_busy: bool) -> list[Measurement]:
    def timed(step: Callable[[], None]) -> float:
        step()
        return rank.seconds

    driver, numpy = Driver(rank), np.random.default_rng(1)  # type: ignore[arg-type]
    made, steps = [], BUSY_STEPS if is_busy else DECODED_STEPS
    for batch in BATCHES:
        seq_ids = [driver.add(random_prompt(numpy, 32), GREEDY) for _ in range(batch)]
        driver.generate(seq_ids, 2)
        with TouchedExperts() as touched:
            driver.step(dict.fromkeys(seq_ids, 1))
        one = Measurement(
            "decode", batch, steps, is_busy, lambda ids=seq_ids: timed(lambda: decode(driver, ids))
        )
        assert touched.num_bytes, "the step was replayed, so nobody saw which experts it used"
        one.num_bytes = dense_bytes(rank.weights.decoder) + touched.num_bytes
        one.operations = 2.0 * batch * active_weights(rank.model, rank.weights.decoder)
        made.append(one)
    whole = Measurement("prefill", PROMPT, 1, is_busy, lambda: timed(lambda: prefill(driver, numpy)))
    whole.operations = 2.0 * PROMPT * active_weights(rank.model, rank.weights.decoder)
    return [*made, whole]


class Patience:
    """Waits for memory to be quiet, for MOST_WAITING seconds in all."""

    def __init__(self, read_bandwidth: ReadBandwidth) -> None:
        self._left, self._read_bandwidth = MOST_WAITING, read_bandwidth

    def bandwidth_of_at_least(self, quiet: float) -> float:
        """The read bandwidth now, below `quiet` once no patience is left."""
        while (bandwidth := self._read_bandwidth()) < quiet and self._left > 0:
            if self._left == MOST_WAITING:
                print(f"others use memory: waiting for it, {MOST_WAITING:.0f} s in all at most", flush=True)
            time.sleep(1)
            self._left -= 1
        return bandwidth


def all_bandwidths(measurements: list[Measurement]) -> list[float]:
    return [value for one in measurements for round_ in one.rounds for value in round_.bandwidths]


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that only count, until the block is left."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def open_peer(model: ModelConfig, threads: int, folder: Path) -> Iterator[LlamaPeer | None]:
    """llama.cpp with a model of these shapes; None, after a line that says why, where it is not installed."""
    if missing := missing_packages():
        print(f"llama.cpp is left out: no package {' and no '.join(missing)}; pip install -e '.[bench]'")
        yield None
        return
    write_random_model(folder / "peer.gguf", model)
    peer = LlamaPeer(folder / "peer.gguf", threads)
    try:
        yield peer
    finally:
        peer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a model of real layer shapes on the CPU.")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--quant", default="wint4", choices=["wint4", "wint4-all", "wint8", "bfloat16"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="processes that compute beside it")
    parser.add_argument("--no-peer", action="store_true", help="do not measure llama.cpp")
    save_option(parser)
    given = parser.parse_args()
    peak, read_bandwidth = int8_peak(), ReadBandwidth(given.threads)
    print(f"{heading()}\n{PRESET}, {given.layers} layers, {given.quant}, random weights"
          + (f", beside {given.busy} busy processes" if given.busy else ""))  # fmt: skip
    cuda_ops.set_num_threads(given.threads)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="octet-cpu-")))
        rank = OneRank(given.layers, given.quant, folder)
        peer = None
        if not given.no_peer:
            peer = stack.enter_context(open_peer(rank.model, given.threads, folder))
        measurements = make_measurements(rank, bool(given.busy))
        stack.enter_context(busy_processes(given.busy))
        patience = Patience(read_bandwidth)

        def quiet_bandwidth() -> float:
            return 0.0 if given.busy else QUIET * max(all_bandwidths(measurements), default=0.0)

        for _ in range(MOST_ROUNDS * given.rounds):
            for one in measurements:
                if len(one.quiet_rounds(quiet_bandwidth())) < given.rounds:
                    one.repeat(read_bandwidth, patience.bandwidth_of_at_least(quiet_bandwidth()), peer)
    bandwidths, quiet = all_bandwidths(measurements), quiet_bandwidth()
    for one in measurements:
        one.make_figures(quiet, given.rounds, peak and peak * given.threads)
    limits = {
        "read_gb_per_second": [round(value / 1e9, 1) for value in bandwidths],
        "int8_peak_gop_per_second_per_core": peak and round(peak / 1e9),
    }
    print(f"read bandwidth {min(bandwidths) / 1e9:.1f} to {max(bandwidths) / 1e9:.1f} GB/s, "
          f"int8 peak per core {limits['int8_peak_gop_per_second_per_core']} GOP/s")  # fmt: skip
    if num_disturbed := sum(len(one.disturbed) for one in measurements):
        num_rounds = sum(len(one.rounds) for one in measurements)
        print(f"{num_disturbed} of {num_rounds} measurements left out: others took memory bandwidth")
    for one in measurements:
        print(one.line())
    if given.save:
        settings = {
            "preset": PRESET,
            "layers": given.layers,
            "quantization": given.quant,
            "threads": given.threads,
            "busy": given.busy,
            "instructions": instructions(),
        }
        save("cpu", {"machine": limits} | {one.name: one.summary() for one in measurements}, settings)


if __name__ == "__main__":
    main()

"""What overlapping is worth: how long the ranks wait for the engine between two steps, with it and without.

Method      As bench_engine.py, with a fake rank that sleeps 5 ms in each step, as the process of a GPU does
            while the GPU computes. What is left of the wall time of a step is what the rank waited.
Bytes and flops
            None.
How to read `waited` should be near zero with overlap; without, it is the engine's host time per step.
            `tokens/s` is what all sequences together get from steps of 5 ms.
Run         ./run.sh bench overlap [--sequences 1,64,256] [--steps 600] [--context 8192] [--save]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import uvloop

from tests.bench.bench_engine import Bench, percentile
from tests.bench.result_files import heading, save, save_option

STEP_SECONDS = 0.005  # of the behaviour "device"


class DeviceBench(Bench):
    """A rank that is busy without using a core."""

    command = [sys.executable, "-m", "tests.engine.fake_rank", "device"]


class OverlappingBench(DeviceBench):
    overlap = True


def measure(num_sequences: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Figures of one row, printed."""
    figures: dict[str, float] = {}
    for name, kind in (("with", OverlappingBench), ("without", DeviceBench)):
        with tempfile.TemporaryDirectory() as folder:
            bench = kind(Path(folder), num_sequences, 0, arguments.context, arguments.steps)
            waited = [step["host"] for step in uvloop.run(bench.run(None))]
        figures[f"waited_us_median_{name}"] = percentile(waited, 0.5)
        figures[f"waited_us_p99_{name}"] = percentile(waited, 0.99)
        seconds = STEP_SECONDS + statistics.fmean(waited) / 1e6
        figures[f"tokens_per_second_{name}"] = num_sequences / seconds
    print(f"{num_sequences:9}" + "".join(f"{value:12.0f}" for value in figures.values()), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", default="1,64,256")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--context", type=int, default=8192)
    save_option(parser)
    arguments = parser.parse_args()
    print(f"{heading()}\nmicroseconds that the rank waits per step: with overlap, then without")
    print("sequences" + "".join(f"{name:>12}" for name in ("waited", "p99", "tokens/s") * 2))
    figures = {f"{count} running": measure(int(count), arguments) for count in arguments.sequences.split(",")}
    if arguments.save:
        save("overlap", figures, {"context": arguments.context, "steps": arguments.steps})


if __name__ == "__main__":
    main()

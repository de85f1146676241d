"""Everything of this folder in one go, within eight minutes: what tests/gpu/run.sh starts.

Each step is a process of its own, so one that fails or hangs costs its figures alone, and the GPU's memory is
given back in between. What was found goes to results/<device>-<date>.json and into the README's table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.result_files import save
from tests.gpu.figures import Figures
from tests.gpu.readme import update_readme

RESULTS = Path(__file__).parent / "results"
TOTAL_SECONDS = 8 * 60
WITHOUT_GRAPHS = ("--clients", "16", "--title", "without graphs", "--", "--no-gpu-graphs")


@dataclass(frozen=True)
class Step:
    """A program that writes figures, and how long it may take."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    seconds: float = 90
    before: tuple[str, ...] = ()  # what the interpreter is started under

    def command(self, interpreter: str, found: Path) -> list[str]:
        """What writes its figures to `found`."""
        return [*self.before, interpreter, "-m", self.module, "--json", str(found), *self.arguments]


def gpu_steps() -> list[Step]:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    under = (sanitizer, "--error-exitcode", "9", "--tool")
    check = "tests.gpu.correctness"
    return [
        Step("correctness", check, seconds=60),
        Step("speed", "tests.gpu.speed", seconds=120),
        Step("rank of 424b", "tests.gpu.rank_step", ("--plan", "424b"), 100),
        Step("all-reduce", "tests.gpu.peers", ("--world", "4"), 60),
        Step("serving 28b", "tests.gpu.serving", seconds=150),
        Step("serving 28b without graphs", "tests.gpu.serving", WITHOUT_GRAPHS, 80),
        Step("whole 28b", "tests.gpu.rank_step", ("--plan", "28b"), 60),
        Step("memcheck", check, ("--small",), 60, (*under, "memcheck")),
        Step("racecheck", check, ("--small",), 60, (*under, "racecheck")),
    ]


def rehearsal_steps() -> list[Step]:
    """The same programs without a GPU, as small as they go."""
    emulated = ("--emulated",)
    return [
        Step("correctness", "tests.gpu.correctness", ("--small", *emulated)),
        Step("speed", "tests.gpu.speed", ("--small", *emulated)),
        Step("rank", "tests.gpu.rank_step", ("--plan", "small", *emulated)),
        Step("all-reduce", "tests.gpu.peers", ("--world", "2", *emulated)),
        Step("serving", "tests.gpu.serving", ("--small", "--clients", "2", "--", "--no-gpu-graphs")),
    ]


def build() -> None:
    """Both libraries, at once. Raises RuntimeError with the compiler's words."""
    modules = ("cuda_ops.build_gpu", "cuda_ops.build")
    running = [subprocess.Popen([sys.executable, "-m", module]) for module in modules]
    failed = [module for module, process in zip(modules, running, strict=True) if process.wait() != 0]
    if failed:
        raise RuntimeError(f"{', '.join(failed)} failed; see above")


def build_emulator() -> None:
    from cuda_ops.emulator import emulated_library_path

    emulated_library_path()


def run_steps(steps: Sequence[Step], seconds: float) -> tuple[Figures, dict[str, str]]:
    """All figures, and what became of each step."""
    deadline, figures, outcomes = time.monotonic() + seconds, Figures(), {}
    with tempfile.TemporaryDirectory() as folder:
        for step in steps:
            left = min(step.seconds, deadline - time.monotonic())
            found = Path(folder, f"{len(outcomes)}.json")
            began = time.monotonic()
            outcome = _run(step, found, left)
            outcomes[step.name] = f"{outcome} after {time.monotonic() - began:.0f} s"
            print(f"--- {step.name}: {outcomes[step.name]}", flush=True)
            if found.exists():
                figures |= json.loads(found.read_text())
    return figures, outcomes


def _run(step: Step, found: Path, seconds: float) -> str:
    if seconds < 5:
        return "skipped, for want of time,"
    try:
        done = subprocess.run(step.command(sys.executable, found), timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return "stopped"
    except FileNotFoundError as error:
        return f"not run ({error.filename} is not installed)"
    return "done" if done.returncode == 0 else f"failed with {done.returncode}"


def add_idle_times(figures: Figures) -> None:
    """How long the GPU waits between two decode steps: the time between tokens less that of the step."""
    for clients in (1, 16, 100):
        seen = figures.get(f"serving, {clients} clients")
        step = figures.get(f"28b decode, {clients} sequences, 3700 context")
        if seen and step and step["ms"] is not None:
            figures[f"idle between steps, {clients} sequences"] = {"ms": seen["gap_ms_p50"] - step["ms"]}


def find_device() -> tuple[str, str]:
    """The first GPU's name and compute capability, as in ("NVIDIA H100 80GB HBM3", "90")."""
    script = "import torch; print(torch.cuda.get_device_name(0), *torch.cuda.get_device_capability(0))"
    asked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        words = asked.stderr.strip().splitlines() or ["it ended without a word"]
        raise SystemExit(f"tests/gpu/run.sh needs a GPU and a PyTorch with CUDA: {words[-1]}")
    name, major, minor = asked.stdout.strip().rsplit(" ", 2)
    return name, major + minor


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: small, and nothing is kept")
    parser.add_argument("--only", default="", help="names of steps, separated by commas")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    began = time.monotonic()
    if asked.rehearse:
        name = "emulator"
        build_emulator()
    else:
        name, capability = find_device()
        os.environ.setdefault("OCTET_GPU_ARCHS", capability)  # for no other GPU: half the time
        build()
    steps = rehearsal_steps() if asked.rehearse else gpu_steps()
    wanted = [step for step in steps if not asked.only or step.name in asked.only.split(",")]
    figures, outcomes = run_steps(wanted, TOTAL_SECONDS - (time.monotonic() - began))
    add_idle_times(figures)
    bench = "-".join(name.lower().replace("nvidia", "").split())
    save(bench, figures, outcomes, gpu=name, folder=asked.results)
    if not asked.rehearse:
        update_readme(asked.results)
    return 0 if all(outcome.startswith("done") for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Host time of one step of the engine: what the ranks would have to wait for.

Method      The real scheduler, step loop and sockets drive one fake rank, a process that answers at once with
            one token per sequence. All sequences decode with `--context` tokens of context. Host time is the
            wall time of a step minus the time the rank was busy: schedule, encode, send, the two ways through
            the sockets, receive, decode, apply. Publishing the tokens to the api happens while the rank
            works, as in production, and is listed apart. Steps follow one another; with overlap, the default
            of the server, most of this time is hidden behind the step before (bench_overlap.py). With --pause
            the rank takes 5 ms for a step: whoever else uses the processors meanwhile leaves cold caches.
            Cores are kept from halting (awake_cores.py), as ranks that compute would; --drowsy lets them, and
            adds what waking four threads one after the other takes.
How to read `host` is the figure of the design: median <= 300 us and p99 <= 1 ms at 256 sequences. It suffers
            when other processes use the machine. `cpu` suffers less: it is the processor time of the engine's
            thread per step, publishing included; the columns behind it are its parts: `send` is encoding and
            handing over, `receive` is decoding. `waiting` is the length of the queue meanwhile. The last row
            has no prefix cache: what it saves of `cpu` is what the cache costs when nothing is ever found.
Run         ./run.sh bench engine [--sequences 1,16,64,256] [--steps 2000] [--context 8192] [--save]
            ./run.sh bench engine --profile --sequences 256     where the time goes; with --save as a file
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import uvloop
import zmq

from engine.config import write_config
from engine.core import quieten_garbage_collector
from engine.gateway import ApiGateway
from engine.loop import StepLoop
from engine.media_files import MediaFiles
from engine.messages import AddRequest, SamplingParams
from engine.metrics import Metrics
from engine.scheduler import Scheduler
from engine.worker_group import WorkerGroup
from tests.bench.awake_cores import cores_awake
from tests.bench.result_files import RESULTS, heading, save, save_option
from tests.engine.processes import RunDirectory, make_server_config

CLIENT = b"api-0"
WARM_UP = 50  # steps not counted
PREFILL = 200  # steps at most until everybody decodes
RANK = [sys.executable, "-m", "tests.engine.fake_rank"]


class Stopwatch:
    """Microseconds per call of methods that it wraps, summed per step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._open: dict[str, float] = defaultdict(float)
        self._last = (time.perf_counter(), time.thread_time())  # when the step before ended

    def wrap(self, owner: Any, method: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*arguments)
            finally:
                self._open[method] += (time.perf_counter() - began) * 1e6

        setattr(owner, method, timed)

    def end_step(self, busy: float) -> None:
        """`busy` is what the rank worked, in seconds."""
        now, last = (time.perf_counter(), time.thread_time()), self._last
        self._open["host"] = (now[0] - last[0] - busy) * 1e6
        self._open["cpu"] = (now[1] - last[1]) * 1e6
        self.steps.append(dict(self._open))
        self._last = now
        self._open.clear()


class Bench:
    """One engine with `num_sequences` decoding and `num_waiting` queued."""

    command = [*RANK, "big-memory"]
    overlap = False

    def __init__(
        self,
        folder: Path,
        num_sequences: int,
        num_waiting: int,
        context: int,
        steps: int,
        caches: bool = True,
    ) -> None:
        config = make_server_config(
            tensor_parallel_size=1,
            block_size=64,
            max_model_len=context + steps + WARM_UP + PREFILL,
            max_num_seqs=num_sequences,
            max_num_batched_tokens=65536,
            max_waiting=20_000,
            enable_prefix_caching=caches,
            rank_timeout=60.0,
        )
        self.num_sequences, self.num_waiting, self.context = num_sequences, num_waiting, context
        self.steps, self.config = steps, config
        self.run_directory = RunDirectory(folder)
        write_config(config, self.run_directory.config)

    async def run(self, profile: cProfile.Profile | None) -> list[dict[str, float]]:
        context, watch = zmq.Context(), Stopwatch()
        gateway = ApiGateway(context, self.run_directory)
        gateway.open()
        group = WorkerGroup(context, self.run_directory, self.config, lambda: None, self.command)
        scheduler = Scheduler(self.config, await group.start(lambda detail: None), [2], 50_000)
        media = MediaFiles(self.run_directory.media, 588)
        loop = StepLoop(scheduler, group, gateway, Metrics(), media, self.overlap)
        self._add_requests(loop)
        self._count_steps(loop, scheduler, group, watch, profile)
        for owner, method in (
            (scheduler, "schedule"),
            (group, "send"),
            (scheduler, "apply"),
            (loop, "_publish"),
            (scheduler, "tidy"),
            (group._incoming, "decode"),
        ):
            watch.wrap(owner, method)
        quieten_garbage_collector()
        await loop.run()
        gateway.close()
        await group.stop()
        context.term()
        return watch.steps[-self.steps :]

    def _add_requests(self, loop: StepLoop) -> None:
        max_tokens = self.steps + WARM_UP + PREFILL
        for index in range(self.num_sequences + self.num_waiting):
            length = self.context if index < self.num_sequences else 16
            prompt = [(index * 7919 + i) % 50_000 for i in range(length)]
            sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
            loop.on_request(CLIENT, AddRequest(f"request-{index:06}", prompt, sampling, [], time.monotonic()))

    def _count_steps(
        self, loop: StepLoop, scheduler: Scheduler, group: WorkerGroup, watch: Stopwatch, profile: Any
    ) -> None:
        """Take the time of whole steps once everybody decodes; stop after enough of them."""
        inner, counted = scheduler.apply, [0]

        def apply(result: Any, now: float) -> None:
            inner(result, now)
            if result.num_tokens < self.num_sequences or scheduler.num_running < self.num_sequences:
                return
            counted[0] += 1
            watch.end_step(result.compute_seconds)
            if counted[0] == WARM_UP and profile:
                profile.enable()
            if counted[0] == self.steps + WARM_UP:
                if profile:
                    profile.disable()
                loop.stop()

        scheduler.apply = apply  # type: ignore[method-assign]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


class PausingBench(Bench):
    """The rank takes 5 ms."""

    command = [*RANK, "device"]


PARTS = {
    "cpu": "cpu",
    "schedule": "schedule",
    "send": "send",
    "receive": "decode",
    "apply": "apply",
    "publish": "_publish",
    "tidy": "tidy",
}


def report(name: str, steps: list[dict[str, float]]) -> dict[str, float]:
    """Prints a row; returns its figures."""
    host = [step["host"] for step in steps]
    figures = {"host_us_median": percentile(host, 0.5), "host_us_p99": percentile(host, 0.99)}
    for part, method in PARTS.items():
        figures[f"{part}_us_median"] = percentile([step.get(method, 0.0) for step in steps], 0.5)
    figures["tidy_us_mean"] = statistics.fmean(step.get("tidy", 0.0) for step in steps)
    print(f"{name:30}" + "".join(f"{value:9.0f}" for value in list(figures.values())[:-1]), flush=True)
    return figures


def measure(arguments: argparse.Namespace, profile: cProfile.Profile | None) -> dict[str, dict[str, float]]:
    counts = [int(count) for count in arguments.sequences.split(",")]
    rows = [(f"{count} running", count, 0, True) for count in counts]
    most = counts[-1]
    rows.append((f"{most} running, {arguments.waiting} waiting", most, arguments.waiting, True))
    rows.append((f"{most} running, no prefix cache", most, 0, False))
    figures = {}
    for name, num_sequences, num_waiting, caches in rows:
        with tempfile.TemporaryDirectory() as folder:
            bench = (PausingBench if arguments.pause else Bench)(
                Path(folder), num_sequences, num_waiting, arguments.context, arguments.steps, caches
            )
            figures[name] = report(name, uvloop.run(bench.run(profile)))
        if profile:
            break
    return figures


def write_profile(profile: cProfile.Profile, arguments: argparse.Namespace) -> None:
    text = io.StringIO()
    print(
        f"{heading()}\n{arguments.sequences} running, {arguments.steps} steps, with cProfile's own cost\n",
        file=text,
    )
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(40)
    print(text.getvalue())
    if arguments.save:
        path = RESULTS / f"engine-profile-{datetime.now(timezone.utc):%Y-%m-%d-%H%M%S}.txt"
        path.write_text("\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", default="1,16,64,256")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--waiting", type=int, default=10_000, help="queue length of the row with one")
    parser.add_argument("--pause", action="store_true", help="the rank takes 5 ms for a step")
    parser.add_argument("--drowsy", action="store_true", help="let idle cores halt")
    parser.add_argument("--profile", action="store_true", help="profile the first row only")
    save_option(parser)
    arguments = parser.parse_args()
    print(f"{heading()}\nmicroseconds per step; medians except host p99")
    names = ["host", "host p99", *PARTS]
    print(" " * 30 + "".join(f"{name:>9}" for name in names))
    profile = cProfile.Profile() if arguments.profile else None
    with nullcontext(False) if arguments.drowsy else cores_awake() as are_awake:
        figures = measure(arguments, profile)
    if profile:
        write_profile(profile, arguments)
    elif arguments.save:
        settings = {name: getattr(arguments, name) for name in ("context", "steps", "pause")}
        settings["cores_awake"] = are_awake
        save("engine", figures, settings)


if __name__ == "__main__":
    main()

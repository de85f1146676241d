"""How long the whole server takes to start from a real checkpoint: cold, and warm from the weight cache.

Method        A -Paddle checkpoint of random bf16 values, the 21B preset cut to --layers, is written to a
              temporary folder (or once to --checkpoint) with a stand-in tokenizer. The server is started on
              it, answers one request and, once it has written the cache, ends; then it is started again. The
              second answer must be the first one's, token for token, with equal log-probabilities. --drop
              takes checkpoint and cache out of the page cache before each start.
Bytes         cold: the checkpoint once per rank that needs it. warm: the final weights once, for checksums.
How to read   loading is what the ranks report, from their first byte to their last. ready is from the command
              to /ready: interpreter, framework and api included. peak is the largest anonymous memory of one
              rank above what it has when it is ready: what loading needs beside the final weights; cold ones
              are anonymous memory themselves, warm ones are the cache's file.
Run           ./run.sh bench start [--layers 6] [--quant wint4] [--tp 1] [--drop] [--checkpoint DIR] [--save]
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.bench.bench_large import ask
from tests.bench.bench_load import drop_pages, write_checkpoint
from tests.bench.result_files import heading, save, save_option
from tests.e2e.server import ROOT, Server, await_true, running_server

_INTERVAL = 0.05  # seconds between two looks at the memory
_KEPT = "weights kept in"  # what a rank logs once its entry is on disk


class RankMemory:
    """The largest anonymous memory of any rank until `settle`, and how much of it was only for loading."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._peaks: dict[int, int] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def settle(self) -> int:
        """Stop watching; bytes above what the rank that needed most has now."""
        self._closing.set()
        self._thread.join()
        now = self._look()
        return max(peak - now.get(pid, peak) for pid, peak in self._peaks.items())

    def _watch(self) -> None:
        while not self._closing.wait(_INTERVAL):
            for pid, resident in self._look().items():
                self._peaks[pid] = max(self._peaks.get(pid, 0), resident)

    def _look(self) -> dict[int, int]:
        found = {}
        for pid in self._server.tree():
            with contextlib.suppress(OSError, StopIteration):
                if b"\0workers\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                    field = next(line for line in lines if line.startswith("RssAnon"))
                    found[pid] = int(field.split()[1]) << 10
        return found


def start(folder: Path, flags: list[str], waits_for_cache: bool) -> tuple[dict[str, float], Any]:
    """Figures of one start, and what the server answered."""
    began = time.monotonic()
    with running_server(folder, *flags, ready=False) as server:
        memory = RankMemory(server)
        try:
            server.wait_until_ready()
            ready = time.monotonic() - began
        finally:
            above = memory.settle()
        loading, weights = loading_line(server.log)
        answer = ask(server, [], 8, logprobs=True)["choices"][0]["logprobs"]
        if waits_for_cache:
            await_true(lambda: _KEPT in server.log, 180, "the weights are in the cache")
    return {
        "loading_seconds": loading,
        "ready_seconds": ready,
        "weights_gb": weights,
        "peak_above_gb": above / 1e9,
    }, answer


def loading_line(log: str) -> tuple[float, float]:
    """Seconds and GB of 'weights loaded in 12.3 s: 2.34 GB on cpu'."""
    words = (
        next(line for line in log.splitlines() if "weights loaded in" in line).split("loaded in ")[1].split()
    )
    return float(words[0]), float(words[2])


def make_model(folder: Path, num_layers: int) -> int:
    """Checkpoint and tokenizer, unless they are there; bytes of the weights."""
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        write_checkpoint(unfinished, num_layers)
        command = [sys.executable, "-m", "models.tiny", str(unfinished / "tokenizer"), "--tokenizer-only"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        unfinished.rename(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--quant", default="wint4", choices=("bfloat16", "wint8", "wint4"))
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--drop", action="store_true", help="read from the disk, not from the page cache")
    parser.add_argument("--checkpoint", type=Path, help="folder that keeps the checkpoint for the next run")
    save_option(parser)
    given = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    answers = []
    with tempfile.TemporaryDirectory(prefix="octet-start-") as scratch:
        model, cache = given.checkpoint or Path(scratch) / "model", Path(scratch) / "cache"
        num_bytes = make_model(model, given.layers)
        print(f"{heading()}\n{given.layers} layers of the 21B, {num_bytes / 1e9:.2f} GB bf16, {given.quant}")
        flags = ["--model", str(model), "--tokenizer", str(model / "tokenizer"), "--quant", given.quant]
        flags += ["--tp", str(given.tp), "--weight-cache", str(cache), "--max-model-len", "2048"]
        for name in ("cold", "warm"):
            if given.drop:
                drop_pages(model, cache)
            figures[name], answer = start(Path(scratch), flags, waits_for_cache=name == "cold")
            answers.append(answer)
            read = num_bytes / 1e9 if name == "cold" else figures[name]["weights_gb"]
            figures[name] |= {"read_gb": read, "gb_per_second": read / figures[name]["loading_seconds"]}
            line = "  ".join(f"{key} {value:.2f}" for key, value in figures[name].items())
            print(f"{name}  {line}", flush=True)
    if answers[0] != answers[1]:
        raise SystemExit("the warm server answers otherwise than the cold one")
    ratio = {
        key: figures["cold"][f"{key}_seconds"] / figures["warm"][f"{key}_seconds"]
        for key in ("loading", "ready")
    }
    print("cold over warm: " + ", ".join(f"{key} {value:.1f}x" for key, value in ratio.items()))
    if given.save:
        settings = {"layers": given.layers, "quantization": given.quant, "tp": given.tp, "drop": given.drop}
        save("start", figures | {"cold over warm": ratio}, settings)


if __name__ == "__main__":
    main()

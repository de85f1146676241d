"""A whole published model on this machine: does it start, what memory does it take, how fast does it answer.

Method        The real server with --load-format dummy (random weights of the true shapes, made in place),
              over HTTP: text alone, then a picture of 640x480 and a question. Each is asked twice, the second
              time about another picture, and the second answer counts; sampling is greedy, every answer has
              --tokens tokens. Meanwhile the resident memory of every process of the server is added up five
              times a second.
Bytes         resident memory counts mapped files and shared libraries once per process, so it is an upper
              bound of what the server takes from the machine
How to read   tokens_per_second is tokens after the first over the time between the first and the last;
              `start` is from the command to /ready, the interpreter and the framework included. The rank's
              log line tells what of it was loading.
Run           ./run.sh bench large [--model ernie-4.5-vl-28b-a3b] [--quant wint4] [--tokens 48] [--save]
                                   [-- FLAGS of the server]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.result_files import heading, save, save_option
from tests.e2e.media import image_part
from tests.e2e.server import Server, running_server

_INTERVAL = 0.2  # seconds between two looks at the memory
_PAGE = os.sysconf("SC_PAGE_SIZE")
_QUESTION = "Tell me about the sea, the wind and the ships that sail there."


class MemoryWatch:
    """The largest sum of resident memory over a server's processes, until closed."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.peak = 0  # bytes
        self.by_process: dict[str, int] = {}  # at the peak
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def look(self) -> int:
        """Bytes now."""
        found: dict[str, int] = {}
        for pid in self._server.tree():
            with contextlib.suppress(OSError):
                name = _name(pid)
                resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
                found[name] = found.get(name, 0) + resident
        total = sum(found.values())
        if total > self.peak:
            self.peak, self.by_process = total, found
        return total

    def _watch(self) -> None:
        while not self._closing.wait(_INTERVAL):
            self.look()


def _name(pid: int) -> str:
    """'workers', 'api', 'engine.core', ...: the module that the process runs."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return words[words.index("-m") + 1] if "-m" in words else words[0].rsplit("/", 1)[-1]


def ask(server: Server, parts: list[Any], num_tokens: int, **options: Any) -> dict[str, Any]:
    """The answer's body, with its timings."""
    body = {
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": _QUESTION}]}],
        "max_tokens": num_tokens,
        "min_tokens": num_tokens,
        "temperature": 0,
        "timings": True,
        **options,
    }
    request = urllib.request.Request(
        f"{server.address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=240) as answer:
        content: dict[str, Any] = json.load(answer)
    assert content["usage"]["completion_tokens"] == num_tokens, content["usage"]
    return content


def measure(server: Server, seeds: Sequence[int], num_tokens: int) -> dict[str, float]:
    """Asks with pictures of these seeds, or without; what comes first makes the second prompt a new one."""
    for attempt, count in (("First", 2), ("Second", num_tokens)):
        pictures = [image_part(seed + len(attempt), 640, 480) for seed in seeds]
        answer = ask(server, [{"type": "text", "text": attempt}, *pictures], count)
    timings = answer["timings"]
    return {
        "prompt_tokens": answer["usage"]["prompt_tokens"],
        "prefill_ms": timings["prefill_ms"],
        "encode_ms": timings["encode_ms"],
        "tokens_per_second": 1e3 * (num_tokens - 1) / timings["decode_ms"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ernie-4.5-vl-28b-a3b")
    parser.add_argument("--quant", default="wint4")
    parser.add_argument("--tokens", type=int, default=48)
    save_option(parser)
    parser.add_argument("server_flags", nargs="*", metavar="-- FLAGS", help="of the server")
    given = parser.parse_args()
    print(f"{heading()}\n{given.model}, {given.quant}, random weights", flush=True)
    flags = ["--model", given.model, "--load-format", "dummy", "--quant", given.quant, *given.server_flags]
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="octet-large-") as folder:
        began = time.monotonic()
        with running_server(Path(folder), *flags, ready=False) as server:
            watch = MemoryWatch(server)
            try:
                server.wait_until_ready()
                figures["start"] = {"seconds": time.monotonic() - began, "resident_gib": watch.look() / 2**30}
                print(f"ready after {figures['start']['seconds']:.1f} s", flush=True)
                for name, seeds in (("text", ()), ("picture", (1,))):
                    figures[name] = measure(server, seeds, given.tokens)
                    print(name, {key: value and round(value, 1) for key, value in figures[name].items()})
            finally:
                watch.close()
                print(
                    "\n".join(
                        line for line in server.log.splitlines() if "weights" in line and "left" not in line
                    )
                )
    figures["memory"] = {"peak_resident_gib": watch.peak / 2**30} | {
        f"{name}_gib": count / 2**30 for name, count in watch.by_process.items()
    }
    print("peak resident GiB:", {name: round(value, 2) for name, value in figures["memory"].items()})
    if given.save:
        settings = {"model": given.model, "quantization": given.quant, "flags": given.server_flags}
        save("large", figures, settings)


if __name__ == "__main__":
    main()

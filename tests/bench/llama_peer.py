"""llama.cpp on the same shapes in a process of its own, measured whenever the benchmark asks.

The benchmark holds a `LlamaPeer`; the process (this file as a program) loads the model once, then answers
one line per question: "decode 16 8" with the seconds of 8 decode steps of 16 sequences, one after the other,
"prefill 512 1" with those of a 512-token prompt. Its threads sleep in between. Needs llama-cpp-python.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_CONTEXT_TOKENS = 32  # in each sequence before decoding
_MAX_SEQUENCES = 16
_PACKAGES = ("gguf", "llama_cpp")
_ERROR = 4  # of llama.cpp's log levels


def missing_packages() -> list[str]:
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


class LlamaPeer:
    """The process, seen from the benchmark."""

    def __init__(self, model: Path, threads: int) -> None:
        command = [sys.executable, "-m", "tests.bench.llama_peer", str(model), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()  # "ready"

    def seconds(self, kind: str, count: int, steps: int) -> list[float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kind} {count} {steps}\n")
        self._process.stdin.flush()
        return [float(text) for text in self._read().split()]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended with exit code {self._process.wait()}; its words are above")
        return line.strip()


def _log_errors(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR:
        sys.stderr.write(text.decode(errors="replace"))


class _Llama:
    """A model and a context of llama.cpp's C API."""

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp

        self._api = api = llama_cpp
        self._log = api.llama_log_callback(_log_errors)  # kept alive for the library
        api.llama_log_set(self._log, None)
        api.llama_backend_init()
        options = api.llama_model_default_params()
        self._model = api.llama_model_load_from_file(path.encode(), options)
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 4096, 512, 512
        settings.n_seq_max, settings.kv_unified = _MAX_SEQUENCES, True
        settings.n_threads = settings.n_threads_batch = threads
        settings.no_perf = True
        self._context = api.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp does not open {path}")
        self._numpy = np.random.default_rng(2)

    def decode(self, batch: int, steps: int) -> list[float]:
        self._clear()
        for sequence in range(batch):
            self._step([(sequence, position) for position in range(_CONTEXT_TOKENS)], [])
        times = []
        for position in range(_CONTEXT_TOKENS, _CONTEXT_TOKENS + steps + 1):
            rows = [(sequence, position) for sequence in range(batch)]
            times.append(self._step(rows, range(batch)))
        return times[1:]

    def prefill(self, length: int, steps: int) -> list[float]:
        return [self._prefill(length) for _ in range(steps)]

    def _prefill(self, length: int) -> float:
        self._clear()
        return self._step([(0, position) for position in range(length)], [length - 1])

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _step(self, rows: list[tuple[int, int]], outputs: Any) -> float:
        """Seconds of one batch of (sequence, position) with random tokens; logits of `outputs`."""
        with self._batch(rows, set(outputs)) as batch:
            started = time.perf_counter()
            if self._api.llama_decode(self._context, batch):
                raise RuntimeError(f"llama.cpp did not decode a batch of {len(rows)}")
            self._api.llama_synchronize(self._context)
            return time.perf_counter() - started

    @contextlib.contextmanager
    def _batch(self, rows: list[tuple[int, int]], outputs: set[int]) -> Iterator[Any]:
        batch = self._api.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (sequence, position) in enumerate(rows):
            batch.token[i] = int(self._numpy.integers(10, 100_000))
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = position, 1, sequence
            batch.logits[i] = i in outputs
        try:
            yield batch
        finally:
            self._api.llama_batch_free(batch)


def main() -> None:
    llama = _Llama(sys.argv[1], int(sys.argv[2]))
    print("ready", flush=True)
    for line in sys.stdin:
        kind, count, steps = line.split()
        print(*getattr(llama, kind)(int(count), int(steps)), flush=True)


if __name__ == "__main__":
    main()

"""The threads that fill the weights of a rank, and the count of what they have filled (work: loader.py)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

Progress = Callable[[int, int], None]  # bytes loaded, bytes in all


@dataclass
class LoadedBytes:
    """Bytes so far, told to the callback; a total of 0 never happens, since every model has norms."""

    total: int
    report: Progress
    loaded: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int) -> None:
        with self.lock:
            self.loaded += count
            self.report(self.loaded, self.total)


class LoadingCrew:
    """Threads that fill buffers; as many matrices are in the host's memory at once as there are threads."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, "load")
        self._free = threading.Semaphore(num_threads)
        self._failed = threading.Event()
        self._jobs: list[Future[None]] = []

    def __enter__(self) -> LoadingCrew:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, job: Callable[[], None]) -> None:
        """Run the job soon; waits while every thread has one. Raises what an earlier job raised."""
        self._free.acquire()
        if self._failed.is_set():
            self._free.release()
            self.finish()
        self._jobs = [running for running in self._jobs if not running.done() or running.exception()]
        self._jobs.append(self._pool.submit(self._run, job))

    def finish(self) -> None:
        """Return when all jobs are done. Raises what the first failed one raised."""
        for job in self._jobs:
            job.result()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException:
            self._failed.set()
            raise
        finally:
            self._free.release()

"""Keeps every core awake while something short is timed.

A core with nothing to do halts, and waking it takes tens of microseconds, on a virtual machine most of all.
A server whose ranks compute has no such cores; a benchmark whose ranks answer at once has little else. One
process per core spins at the idle priority of Linux: it runs when nobody else wants to, and gives way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SPIN = """
import ctypes, os, signal
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with whoever started it
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
print(flush=True)
while True:
    pass
"""


@contextmanager
def cores_awake() -> Iterator[None]:
    """Linux only."""
    command = [sys.executable, "-c", _SPIN]
    spinners = [
        subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(len(os.sched_getaffinity(0)))
    ]
    try:
        for spinner in spinners:
            assert spinner.stdout is not None
            spinner.stdout.readline()
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.communicate()

"""Keeps idle cores from halting while something short is timed.

Waking a core that has halted takes tens of microseconds, in a virtual machine most of all. A server whose
ranks compute has no idle cores; a benchmark whose ranks answer at once has little else. Linux keeps them all
polling for as long as somebody holds /dev/cpu_dma_latency open with a tolerance of 0, which needs root.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_DEVICE = "/dev/cpu_dma_latency"  # see power/pm_qos_interface in the kernel's documentation


@contextmanager
def cores_awake() -> Iterator[bool]:
    """Yields whether it worked; says so on stderr if it did not."""
    try:
        request = open(_DEVICE, "wb", buffering=0)  # noqa: SIM115
    except OSError as error:
        print(f"cores may halt between steps, which adds to the times: {error}", file=sys.stderr)
        yield False
        return
    with request:
        request.write(struct.pack("i", 0))  # microseconds
        yield True

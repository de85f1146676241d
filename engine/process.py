"""How every child process of a server begins: bound to its parent, deaf to Ctrl-C, with one log format.

The supervisor alone answers the terminal's Ctrl-C and stops the others in order; a child that lost its
parent is killed by the kernel, so nothing outlives the tree. May be imported by api and workers.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PARENT = "OCTET_PARENT_PID"
_QUIET_LOGGERS = ("asyncio", "aiohttp.access", "urllib3", "httpx", "huggingface_hub", "filelock", "PIL")


def begin_child(name: str, signal_on_parent_death: int = signal.SIGKILL) -> None:
    """Call first in the main thread of a child process: lifetime, signals and log format in one line.

    `name` appears in each log line: "engine", "api", "rank 3". SIGTERM keeps its default until the
    process installs its own handler.
    """
    die_with_parent(signal_on_parent_death)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging(name)


def die_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Ask the kernel to send `signal_number` when the parent ends, and leave now if it already has.

    The kernel watches the parent's *thread* that forked us, so parents start children from their main
    thread, with `environment_for_child`: a parent that died before this call is noticed by its id.
    """
    parent = int(os.environ.pop(_PARENT, os.getppid()))  # popped: our own children have another parent
    _prctl(_PR_SET_PDEATHSIG, int(signal_number))
    if os.getppid() != parent:
        os._exit(1)


def environment_for_child(passed_on: Iterable[str] | None = None) -> dict[str, str]:
    """Our environment, or just the variables named, and who the parent is; for users of `begin_child`."""
    names = os.environ if passed_on is None else [name for name in passed_on if name in os.environ]
    return {**{name: os.environ[name] for name in names}, _PARENT: str(os.getpid())}


def adopt_orphans() -> None:
    """Become the parent of grandchildren whose own parent died, so that they can be waited for."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def await_adoption(parent: int, forked_by: int) -> None:
    """Return when the process that forked us has ended; `begin_child` then leaves unless `parent` adopted us.

    For who is forked by a short-lived process in the name of that one's parent.
    """
    while os.getppid() == forked_by:
        time.sleep(0.001)
    os.environ[_PARENT] = str(parent)


def name_process(name: str) -> None:
    """What `ps` and `top` call this process; at most 15 characters."""
    _prctl(_PR_SET_NAME, ctypes.create_string_buffer(name.encode()[:15]))


def configure_logging(name: str, level: int = logging.INFO) -> None:
    """One readable line per record on stderr: time, process, level, text. Libraries speak from WARNING up."""
    handler = logging.StreamHandler(sys.stderr)
    line = f"{clear_line()}%(asctime)s {name:<8} %(levelname)-7s %(message)s"
    handler.setFormatter(logging.Formatter(line, datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for logger in _QUIET_LOGGERS:
        logging.getLogger(logger).setLevel(logging.WARNING)


def clear_line() -> str:
    """What to write before a line, so that it does not stick to a progress bar."""
    return "\r\x1b[K" if sys.stderr.isatty() else ""


def describe_exit(returncode: int) -> str:
    """'exit code 1' or 'killed by SIGSEGV', for a sentence."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


def _prctl(option: int, value: int | ctypes.Array[ctypes.c_char]) -> None:
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        prctl = libc.prctl
    except (OSError, AttributeError):
        return
    prctl(option, value, 0, 0, 0)

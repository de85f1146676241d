"""Makes, locks and removes the private directory of one server, and sweeps up after servers that died.

Everything a server could leave behind lies in this one directory: sockets, media files, shared pages.
It is called octet-<pid>-<random>, belongs to the owner alone, and its lock is held as long as the
supervisor lives. What lies where inside is in channels.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType

from engine.channels import RunDirectory
from engine.errors import ConfigError

_PREFIX = "octet-"
SHARED_MEMORY = Path("/dev/shm")
_ENOUGH = 512 << 20  # bytes of shared memory; containers often have 64 MiB, too little for a video
_LONGEST_SOCKET = 107  # bytes in the path of a unix socket
_YOUNG = 60.0  # seconds in which a directory without a lock may be one that is just being made


class OwnedRunDirectory:
    """`with OwnedRunDirectory() as run:` gives a RunDirectory that is gone afterwards."""

    def __enter__(self) -> RunDirectory:
        root = choose_root()
        remove_stale(root)
        self._path = root / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        if len(f"{self._path}/results.sock") > _LONGEST_SOCKET:
            raise ConfigError(
                f"the temporary folder {root} has too long a name for sockets; set TMPDIR to a shorter one"
            )
        self._path.mkdir(mode=0o700)
        self._lock = os.open(_lock_of(self._path), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        run = RunDirectory(self._path)
        run.media.mkdir(mode=0o700)
        return run

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        os.close(self._lock)


def choose_root() -> Path:
    """/dev/shm, where files are memory, if there is room; else the temporary folder."""
    with contextlib.suppress(OSError):
        space = os.statvfs(SHARED_MEMORY)
        if os.access(SHARED_MEMORY, os.W_OK) and space.f_bavail * space.f_frsize >= _ENOUGH:
            return SHARED_MEMORY
    return Path(tempfile.gettempdir())


def remove_stale(root: Path) -> list[Path]:
    """Remove directories of servers that were killed with their whole tree; returns what is gone."""
    stale = [path for path in root.glob(f"{_PREFIX}*-*") if _is_stale(path)]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return stale


def _is_stale(path: Path) -> bool:
    """Ours, its process gone, and nobody holds the lock (the process may live in another container)."""
    try:
        about = path.lstat()
        pid = int(path.name.split("-")[1])
        if (
            about.st_uid != os.getuid()
            or not path.is_dir()
            or path.is_symlink()
            or Path(f"/proc/{pid}").exists()
        ):
            return False
        return not _is_locked(path, about.st_mtime)
    except (OSError, ValueError):
        return False


def _is_locked(path: Path, changed: float) -> bool:
    try:
        lock = os.open(_lock_of(path), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return time.time() - changed < _YOUNG
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(lock)


def _lock_of(path: Path) -> Path:
    return path / "lock"

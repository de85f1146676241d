"""The patch files of live requests: checked when a request comes, deleted when nobody needs them any more.

The api writes them and hands them over; several requests may name the same file. The ranks open a file
while they run a step, so files stay until the last step that may read them has ended.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from engine.errors import RequestError
from engine.messages import MediaItem


class MediaFiles:
    """Counts who still needs which file of the media folder."""

    def __init__(self, folder: Path, patch_bytes: int) -> None:
        self._folder = folder
        self._patch_bytes = patch_bytes  # of one patch: channels * height * width
        self._users: Counter[str] = Counter()
        self._unused: dict[str, int] = {}  # file -> the last step that may read it

    def hold(self, items: Iterable[MediaItem]) -> None:
        """One more user for each file. Raises RequestError, holding none, when a rank could not read one."""
        items = list(items)
        for item in items:
            self._check(item)
        self._users.update(item.file for item in items)

    def release(self, items: Iterable[MediaItem], last_step: int = 0) -> None:
        """One user less; a file without users goes at the first `sweep` after `last_step`."""
        for item in items:
            self._users[item.file] -= 1
            if self._users[item.file] <= 0:
                del self._users[item.file]
                self._unused[item.file] = max(last_step, self._unused.get(item.file, 0))

    def refuse(self, items: Iterable[MediaItem]) -> None:
        """Files of a request that was not taken: they are ours too, and nobody else's unless held."""
        for item in items:
            if _is_plain_name(item.file):
                self._unused.setdefault(item.file, 0)

    def sweep(self, done_step: int) -> None:
        """Delete what has no users and was last read in step `done_step` or before."""
        for name in [one for one, last_step in self._unused.items() if last_step <= done_step]:
            del self._unused[name]
            if name not in self._users:
                with contextlib.suppress(FileNotFoundError):
                    (self._folder / name).unlink()

    def _check(self, item: MediaItem) -> None:
        frames, rows, columns = item.grid
        expected = frames * rows * columns * self._patch_bytes
        if not _is_plain_name(item.file):
            raise RequestError(f"the {item.kind} has an impossible file name", status=500)
        try:
            actual = (self._folder / item.file).stat().st_size
        except OSError:
            raise RequestError(f"the patches of the {item.kind} are gone", status=500) from None
        if actual != expected:
            raise RequestError(
                f"the {item.kind} has {actual} bytes of patches, expected {expected}", status=500
            )


def _is_plain_name(name: str) -> bool:
    return bool(name) and name not in (".", "..") and "/" not in name and "\0" not in name

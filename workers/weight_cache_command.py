"""`./run.sh cache [list|clear] [--weight-cache DIR]`: what the weight cache holds, and how to empty it.

list    every entry: size, when it was used last, which model, format and rank (the default)
clear   remove all entries, or with --unused DAYS those not used for so long; servers that run keep theirs
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from workers.weight_cache import Entry, list_entries

_DAY = 86400.0


def main(arguments: Sequence[str]) -> int:
    given = _parse(arguments)
    folder = Path(given.folder).expanduser()
    entries = list_entries(folder)
    if given.verb == "clear":
        _clear(folder, [entry for entry in entries if time.time() - entry.used >= given.unused * _DAY])
        return 0
    for entry in entries:
        print(_line(entry))
    print(f"{folder}: {len(entries)} entries, {_gib(sum(entry.num_bytes for entry in entries))}")
    return 0


def default_folder() -> str:
    """As the server chooses it: $OCTET_CACHE, else ~/.cache/octet."""
    return str(Path(os.environ.get("OCTET_CACHE") or "~/.cache/octet") / "weights")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run.sh cache", description="List or clear the weight cache.")
    parser.add_argument("verb", nargs="?", choices=("list", "clear"), default="list")
    parser.add_argument("--weight-cache", dest="folder", default=default_folder(), metavar="DIR")
    parser.add_argument(
        "--unused", type=float, default=0.0, metavar="DAYS", help="with clear: only what is older"
    )
    return parser.parse_args(list(arguments))


def _clear(folder: Path, entries: Sequence[Entry]) -> None:
    for entry in entries:
        entry.path.unlink(missing_ok=True)
        entry.path.with_suffix(".lock").unlink(missing_ok=True)
    print(f"{folder}: removed {len(entries)} entries, {_gib(sum(entry.num_bytes for entry in entries))}")


def _line(entry: Entry) -> str:
    about = entry.about
    what = "cannot be read; it will be made again"
    if about:
        shard = f"rank {about.get('rank')} of {about.get('world')}"
        what = f"{about.get('model')} in {about.get('quantization')}, {shard}"
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
    return f"{entry.path.stem[:12]}  {_gib(entry.num_bytes):>10}  used {used}  {what}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

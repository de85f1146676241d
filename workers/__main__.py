"""`python -m workers <run_dir> <rank>`: started by the engine core, never by hand.

With descriptors separated by commas in place of the rank, the process that forks all ranks: zygote.py.
"""

from __future__ import annotations

import logging
import os
import sys

from engine.channels import RunDirectory
from engine.process import begin_child


def main(run_directory: str, rank: int) -> int:
    begin_child(f"rank {rank}")
    from workers.worker import Worker  # after the signals are set: importing takes a while

    return Worker(RunDirectory(run_directory), rank).serve()


def leave(code: int) -> None:
    """End at once: all is closed and sent, and taking the framework apart costs over a second of CPU."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if "," in sys.argv[2]:
        from workers import zygote

        leave(zygote.main(sys.argv[1], [int(word) for word in sys.argv[2].split(",")]))
    leave(main(sys.argv[1], int(sys.argv[2])))

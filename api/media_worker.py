"""A decoding process: takes jobs from stdin, answers on stdout (one socket), trusts nothing that it decodes.

    python -m api.media_worker <model folder> <threads> <memory bytes>

It holds no secrets, opens no connection and is limited in memory and time, so that a hostile file costs one
request, not the server. The other side is media/pool.py.
"""

from __future__ import annotations

import os
import resource
import sys
from typing import BinaryIO

from api.media.decode import run_job
from api.media.patches import load_ops
from api.media.protocol import DecodeJob, DecoderReady, pack, read_frame, unpack_job
from api.media.timestamp import TimestampFont
from engine.errors import ConfigError
from engine.process import begin_child

CPU_SECONDS = {"image": 20, "video": 300}  # of all threads together, for one job
_MAX_OUTPUT = 4 << 30  # bytes of one patch file


def main() -> int:
    model_folder, threads, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    begin_child("media")
    requests, replies = _take_pipes()
    try:
        font = TimestampFont(model_folder)
    except ConfigError as error:
        replies.write(pack(DecoderReady(str(error))))
        return 1
    load_ops()  # before limits and before the first picture waits for it
    _limit_resources(memory)
    replies.write(pack(DecoderReady()))
    while (body := read_frame(requests)) is not None:
        job = unpack_job(body)
        _limit_time(job)
        replies.write(pack(run_job(job, font, threads)))
    return 0


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the pipes to ourselves: a library that prints must not break the protocol."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return requests, replies


def _limit_resources(memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_OUTPUT, _MAX_OUTPUT))


def _limit_time(job: DecodeJob) -> None:
    """The kernel ends us when this job takes more; the limit counts from the process' start."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(usage.ru_utime + usage.ru_stime) + 1 + CPU_SECONDS[job.kind]
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    sys.exit(main())

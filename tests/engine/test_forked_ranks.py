"""Ranks that another process forked are children like those we start ourselves."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from engine.forked_ranks import ForkedProcess, fork_ranks
from engine.rank_process import RankProcess

# Forks one child per descriptor, as workers/zygote.py does; each runs sys.argv[1] when it was adopted.
ZYGOTE = """
import os, sys
from engine.process import await_adoption, begin_child
engine, own = os.getppid(), os.getpid()
pids = []
for rank, output in enumerate(map(int, sys.argv[3].split(","))):
    if not (pid := os.fork()):
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.closerange(3, 256)
        await_adoption(engine, own)
        begin_child(f"rank {rank}")
        exec(sys.argv[1])
        os._exit(0)
    pids.append(pid)
print(*pids, flush=True)
os._exit(0)
"""


def fork(code: str, tmp_path: Path, use: Any, world: int = 2) -> Any:
    """What `use` returns for the processes forked; their code has `rank` and `os`."""

    async def run() -> Any:
        command = [sys.executable, "-c", ZYGOTE, code]
        return await asyncio.wait_for(use(await fork_ranks(tmp_path, world, command)), 30)

    return asyncio.run(run())


def test_exit_status_of_every_forked_rank_is_known(tmp_path: Path):
    async def use(processes: list[ForkedProcess]) -> list[int]:
        return await asyncio.gather(*(process.wait() for process in processes))

    assert fork("os._exit(3 + rank)", tmp_path, use, world=3) == [3, 4, 5]


def test_killed_rank_is_reported_as_killed_and_cannot_be_killed_twice(tmp_path: Path):
    async def use(processes: list[ForkedProcess]) -> str:
        ended: list[int] = []
        rank = RankProcess(7, ended.append)
        rank.follow(processes[0])
        assert rank.is_started and rank.exit_description == "still running"
        rank.kill()
        assert await rank.wait(20)
        assert ended == [7]
        rank.kill()
        processes[1].kill()
        assert await processes[1].wait() == -9
        return rank.exit_description

    assert fork("import time; time.sleep(60)", tmp_path, use) == "killed by SIGKILL"


def test_last_words_of_a_forked_rank_are_kept(tmp_path: Path):
    async def use(processes: list[ForkedProcess]) -> list[list[str]]:
        ranks = [RankProcess(index, lambda rank: None) for index in range(2)]
        for rank, process in zip(ranks, processes, strict=True):
            rank.follow(process)
        assert all([await rank.wait(20) for rank in ranks])
        return [rank.last_lines for rank in ranks]

    code = "os.write(1, b'first\\n'); os.write(2, f'last of {rank}\\n'.encode())"
    assert fork(code, tmp_path, use) == [["first", "last of 0"], ["first", "last of 1"]]


def test_ranks_are_started_one_by_one_where_they_cannot_be_forked(tmp_path: Path):
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    assert asyncio.run(fork_ranks(tmp_path, 2, command)) == []

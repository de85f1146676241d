"""All imports of a CPU rank leave a process with one thread, so that it may fork."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

from engine.channels import RunDirectory
from engine.config import ServerConfig, write_config
from engine.forked_ranks import fork_ranks

ROOT = Path(__file__).resolve().parents[2]


def write_run_directory(folder: Path) -> Path:
    run = RunDirectory(folder)
    write_config(ServerConfig(model="unused", tensor_parallel_size=2, run_directory=str(folder)), run.config)
    return folder


def test_real_ranks_are_forked_with_pipes_of_their_own(tmp_path: Path):
    async def run() -> list[set[str]]:
        processes = await fork_ranks(write_run_directory(tmp_path), 2)
        found = []
        for process in processes:
            links = [Path(f"/proc/{process.pid}/fd/{descriptor}").readlink() for descriptor in range(3)]
            found.append({str(link).partition(":")[0] for link in links})
            process.kill()
            assert await process.wait() == -signal.SIGKILL
        return found

    found = asyncio.run(run())
    assert len(found) == 2, "the imports started a thread; zygote.py tells how it counts them"
    assert all(kinds == {"/dev/null", "pipe"} for kinds in found)


def test_process_with_a_second_thread_does_not_fork(tmp_path: Path):
    code = (
        "import sys, threading; from workers import zygote;"
        "threading.Thread(target=threading.Event().wait, daemon=True).start();"
        "zygote._import_all = lambda run: None;"
        "sys.stdout.flush(); zygote.os._exit(zygote.main(sys.argv[1], [1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 3 and not done.stdout, done.stderr

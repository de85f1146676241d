"""However a server ends, it says so and leaves nothing: no process, no file, no shared memory."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import openai
import pytest

from tests.e2e.server import Server, await_true, living, run_directories, running_server

pytestmark = pytest.mark.e2e


def assert_nothing_left(server: Server, tree: list[int]) -> None:
    await_true(lambda: not living(tree), 15, f"all of {tree} gone (alive: {living(tree)})")
    assert run_directories(server.process.pid) == []


def open_stream(server: Server) -> openai.Stream:  # type: ignore[type-arg]
    """A long answer whose first token has arrived."""
    stream = server.client(timeout=60).chat.completions.create(
        model="octet",
        messages=[{"role": "user", "content": "Go on for ever."}],
        max_tokens=100_000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    return stream


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_whole_tree_cleanly(tmp_path: Path, sent: signal.Signals) -> None:
    with running_server(tmp_path, "--tp", "2") as server:
        tree = server.tree()
        assert server.stop(sent) == 0, server.log
        assert_nothing_left(server, tree)


def test_a_signal_while_loading_ends_the_whole_tree(tmp_path: Path) -> None:
    with running_server(tmp_path, "--tp", "2", ready=False) as server:
        await_true(lambda: len(server.tree()) >= 4, 60, "the ranks have started")
        tree = server.tree()
        server.stop()
        assert_nothing_left(server, tree)


def test_a_killed_parent_takes_its_children_and_files_along(tmp_path: Path) -> None:
    with running_server(tmp_path, "--tp", "2") as server:
        tree = server.tree()
        server.stop(signal.SIGKILL)
        await_true(lambda: not living(tree), 15, f"all of {tree} gone")
        assert run_directories(server.process.pid) == []


def test_a_dead_rank_ends_open_streams_with_an_error_and_the_server_with_a_failure(tmp_path: Path) -> None:
    with running_server(tmp_path, "--tp", "2") as server:
        tree, stream = server.tree(), open_stream(server)
        ranks = [pid for pid in tree if b"\0workers\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        killer = threading.Timer(0.2, os.kill, (ranks[-1], signal.SIGKILL))
        killer.start()
        started = time.monotonic()
        with pytest.raises(openai.APIError, match="rank 1"):
            for _ in stream:
                pass
        assert server.process.wait(20) != 0
        assert time.monotonic() - started < 20
        assert "rank 1" in server.log
        assert_nothing_left(server, tree)


def test_two_servers_live_side_by_side(tmp_path: Path) -> None:
    with running_server(tmp_path) as first, running_server(tmp_path) as second:
        for server in (first, second):
            answer = server.client().completions.create(model="octet", prompt="One, two,", max_tokens=2)
            assert answer.usage is not None and answer.usage.completion_tokens <= 2


def test_a_taken_port_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with (
        running_server(tmp_path) as first,
        running_server(tmp_path, "--port", str(first.port), ready=False) as second,
    ):
        assert second.process.wait(60) != 0
        assert str(first.port) in second.log and "Traceback" not in second.log

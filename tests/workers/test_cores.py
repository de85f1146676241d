"""Ranks stay on cores of their own where there are enough, and share them where there are not."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from engine.config import ServerConfig
from workers import cores
from workers.cores import own_cores, stay_on_own_cores, threads_per_rank


def machine(folder: Path, places: list[tuple[int, int]]) -> Path:
    """A /sys/devices/system/cpu with a (socket, core) per hardware thread."""
    for number, (socket, core) in enumerate(places):
        topology = folder / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{socket}\n")
        (topology / "core_id").write_text(f"{core}\n")
    return folder


def all_sets(world: int, threads: int, usable: range, topology: Path) -> list[frozenset[int] | None]:
    return [own_cores(rank, world, threads, usable, topology) for rank in range(world)]


def test_ranks_share_all_cores_between_them_and_none_twice(tmp_path: Path):
    topology = machine(tmp_path, [(0, core) for core in range(16)])
    found = all_sets(8, 2, range(16), topology)
    assert [len(own) for own in found] == [2] * 8
    assert frozenset.union(*found) == frozenset(range(16))


def test_both_threads_of_a_core_and_all_cores_of_a_socket_go_to_one_rank(tmp_path: Path):
    # As Linux numbers two sockets of two cores: the second threads of all cores come last.
    places = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 0), (1, 0), (0, 1), (1, 1)]
    topology = machine(tmp_path, places)
    assert all_sets(2, 4, range(8), topology) == [{0, 2, 4, 6}, {1, 3, 5, 7}]
    assert all_sets(4, 2, range(8), topology) == [{0, 4}, {2, 6}, {1, 5}, {3, 7}]


@pytest.mark.parametrize(
    ("world", "threads", "count"),
    [(1, 4, 4), (2, 1, 2), (8, 1, 8), (2, 3, 4)],
    ids=["one rank", "a core each", "eight on eight", "more threads than cores"],
)
def test_nobody_is_pinned_where_cores_are_few(tmp_path: Path, world: int, threads: int, count: int):
    topology = machine(tmp_path, [(0, core) for core in range(count)])
    assert all_sets(world, threads, range(count), topology) == [None] * world


def test_cores_that_the_process_may_not_use_are_nobodys(tmp_path: Path):
    topology = machine(tmp_path, [(0, core) for core in range(12)])
    assert all_sets(2, 4, range(4, 12), topology) == [set(range(4, 8)), set(range(8, 12))]


def test_a_system_that_tells_nothing_of_its_cores_gives_them_in_order(tmp_path: Path):
    assert all_sets(2, 2, range(4), tmp_path) == [{0, 1}, {2, 3}]


def _pinned(connection: multiprocessing.connection.Connection, config: ServerConfig) -> None:
    cores.own_cores = lambda *_: frozenset(sorted(os.sched_getaffinity(0))[:1])  # type: ignore[assignment]
    stay_on_own_cores(config, 0)
    connection.send((threads_per_rank(config), os.sched_getaffinity(0)))


def test_threads_are_counted_as_before_when_the_rank_stays_on_its_cores():
    usable = os.sched_getaffinity(0)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_pinned, args=(theirs, ServerConfig()))
    process.start()
    assert ours.poll(30)
    threads, allowed = ours.recv()
    process.join(30)
    assert threads == len(usable)
    assert allowed == {min(usable)}

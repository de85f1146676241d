"""The collectives of a GPU rank: what goes through mapped memory, what through NCCL."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest

import cuda_ops
from engine.errors import EngineError
from tests.workers.fake_collectives import FakeNcclLibrary, FakePeers, LoneHost
from tests.workers.ranks import RankThreads
from workers.device.gpu_group import GpuGroup
from workers.device.nccl import Nccl
from workers.device.open_gpu import open_peers
from workers.device.paddle import PaddleCpu


def test_sums_go_through_peers_in_pieces_and_the_rest_through_nccl():
    library, peers, host = FakeNcclLibrary(), FakePeers(), PaddleCpu()
    group = GpuGroup(LoneHost(), Nccl(library), peers, 0, 2, 7)  # type: ignore[arg-type]
    assert library.calls.pop() == ("join", b"the ranks of one server", 0, 2)

    group.all_reduce(host.zeros((10, 16), "bfloat16"))
    assert peers.sums == [64, 64, 32] and not library.calls, "rank order, whatever the size"
    group.all_reduce(host.zeros((3, 4), "float32"))
    group.all_gather(host.zeros((5,), "float32"), host.zeros((2, 5), "float32"))
    group.broadcast(host.zeros((6,), "int32"), 1)
    group.barrier()
    assert library.calls == [("sum", 12, 7, 0, 7), ("gather", 5, 7, 7), ("broadcast", 6, 2, 1, 7)]
    group.close()
    assert library.calls[-1] == ("leave", 5) and peers.sums[-1] == -1

    without = GpuGroup(LoneHost(), Nccl(library), None, 0, 2, 7)  # type: ignore[arg-type]
    without.all_reduce(host.zeros((10, 16), "bfloat16"))
    assert library.calls[-1] == ("sum", 160, 9, 0, 7)


def test_a_sum_and_the_norm_behind_it_are_one_kernel_where_ranks_map_each_others_memory():
    library, peers, host = FakeNcclLibrary(), FakePeers(), PaddleCpu()
    group = GpuGroup(LoneHost(), Nccl(library), peers, 0, 2, 7)  # type: ignore[arg-type]
    library.calls.clear()
    x, residual, out = (host.zeros((10, 16), "bfloat16") for _ in range(3))
    group.all_reduce_add_rms_norm(x, residual, host.zeros((16,), "bfloat16"), 1e-5, out)
    assert peers.fused == [(4, 1e-5), (4, 1e-5), (2, 1e-5)]
    assert not peers.sums and not library.calls


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_sum_and_the_norm_behind_it_are_two_kernels_elsewhere(dtype):
    library, host = FakeNcclLibrary(), PaddleCpu()
    peers = None if dtype == "bfloat16" else FakePeers()
    group = GpuGroup(LoneHost(), Nccl(library), peers, 0, 2, 7)  # type: ignore[arg-type]
    x, residual, out = (host.zeros((1, 4), dtype) for _ in range(3))
    host.write(x, np.array([[3, 4, 0, 0]], np.float32))
    group.all_reduce_add_rms_norm(x, residual, host.upload(np.ones(4, np.float32), dtype), 0.0, out)
    assert library.calls[-1][:2] == ("sum", 4)
    assert host.download(residual).tolist() == [[3, 4, 0, 0]]
    assert np.allclose(host.download(out), [[1.2, 1.6, 0, 0]], atol=0.01)


def test_collective_that_fails_is_named():
    with pytest.raises(
        EngineError, match=r"ncclCommInitRank failed.*unhandled system error \(NCCL error 2\)"
    ):
        GpuGroup(LoneHost(), Nccl(FakeNcclLibrary(answer=2)), None, 0, 2, 7)  # type: ignore[arg-type]


@pytest.mark.parametrize("broken", [None, "creating", "opening"])
def test_ranks_map_each_other_or_none_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str | None
):
    class Peers:
        def __init__(
            self, rank: int, world: int, capacity: int, give: Callable[[np.ndarray], np.ndarray]
        ) -> None:
            if broken == "creating" and rank == 1:
                raise RuntimeError("no memory")
            handles = give(np.full(64, rank + 1, np.uint8))
            if broken == "opening" and rank == 0:
                raise ValueError("no peer access")
            if not handles[1].any():
                raise ValueError("no handle")
            assert handles[:, 0].tolist() == [1, 2]

        def close(self) -> None: ...

    monkeypatch.setattr(cuda_ops, "PeerGroup", Peers)
    with caplog.at_level(logging.WARNING):
        opened = RankThreads(2).run(lambda device: open_peers(device._group, device.rank, 2))  # type: ignore[attr-defined]
    assert [one is not None for one in opened] == [broken is None] * 2
    assert ("sums go through NCCL" in caplog.text) == (broken is not None)


def test_more_ranks_than_peers_use_nccl():
    assert open_peers(LoneHost(), 0, 9) is None  # type: ignore[arg-type]

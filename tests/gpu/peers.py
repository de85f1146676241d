"""All-reduce between processes through memory that they map from each other (CUDA IPC).

Every rank is a process; on one GPU they share it in turns, so this says that sums are right, not how fast
they would be. Each rank knows what the others send and checks every bit; calls follow each other without
waiting, change their size, and are replayed from a graph.

Run   python -m tests.gpu.peers [--world 4] [--emulated]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import cuda_ops
from tests.gpu.figures import add_options, show
from tests.gpu.machine import Machine, open_machine

CAPACITY = 64 * 8192  # more than one-shot sums take
SMALL_CAPACITY = 4096  # for the emulator; tests/cuda_ops/gpu has the large sums
TIMEOUT = 60.0  # seconds, for the meeting before the first call


def check_ranks(world: int, is_emulated: bool) -> list[str]:
    """Start `world` processes; what was wrong, one line per rank that complains."""
    flags = ["--emulated"] if is_emulated else []
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.gpu.peers", f"--world={world}", f"--rank={rank}",
                 f"--meeting={folder}/meeting", *flags],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        try:
            said = [rank.communicate(timeout=4 * TIMEOUT)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    return [
        f"rank {i}: {words.strip() or rank.returncode}"
        for i, (rank, words) in enumerate(zip(ranks, said, strict=True))
        if rank.returncode != 0
    ]


class Rank:
    """One rank's checks; every rank makes the same calls."""

    def __init__(self, machine: Machine, rank: int, world: int, meeting: Path) -> None:
        self.machine, self.rank, self.world = machine, rank, world
        self.group = cuda_ops.SharedMemoryGroup(meeting, rank, world, TIMEOUT)

        def exchange(own: np.ndarray) -> np.ndarray:
            handles = np.zeros((world, len(own)), np.uint8)
            self.group.all_gather(own, handles)
            return handles

        self.capacity = SMALL_CAPACITY if machine.is_emulated else CAPACITY
        self.peers = cuda_ops.PeerGroup(rank, world, self.capacity, exchange)
        self.group.barrier()

    def check(self) -> list[str]:
        """The differences found."""
        wrong = []
        for seed, size in enumerate((8, 4096, 64, self.capacity, self.capacity // 4, 8)):
            out, expected = self._sum(size, seed), self._expected(size, seed)
            if not torch.equal(out, expected):
                wrong.append(f"the sum of {size} elements differs")
        wrong += self._check_burst() + self._check_norm()
        self.machine.synchronize()
        self.group.barrier()
        self.peers.close()
        self.group.close()
        return wrong

    def _parts(self, size: int, seed: int) -> list[torch.Tensor]:
        """What every rank sends."""
        made = []
        for rank in range(self.world):
            random = torch.Generator().manual_seed(1000 * seed + rank)
            made.append(torch.randn(size, generator=random).to(torch.bfloat16))
        return made

    def _expected(self, size: int, seed: int) -> torch.Tensor:
        total = torch.zeros(size)
        for part in self._parts(size, seed):
            total += part.float()
        return total.to(torch.bfloat16).to(self.machine.device)

    def _sum(self, size: int, seed: int) -> torch.Tensor:
        x = self._parts(size, seed)[self.rank].to(self.machine.device)
        out = self.machine.empty(size)
        self.peers.all_reduce(x, out)
        return out

    def _check_burst(self) -> list[str]:
        """Many calls in a graph, replayed twice: nobody waits for the host in between."""
        count = 4 if self.machine.is_emulated else 40
        parts = [self._parts(256, seed)[self.rank].to(self.machine.device) for seed in range(4)]
        outs = [self.machine.empty(256) for _ in range(4)]

        def burst() -> None:
            for i in range(count):
                self.peers.all_reduce(parts[i % 4], outs[i % 4])

        replay = self.machine.captured(burst)
        self.group.barrier()
        for _ in range(2):
            replay()
        right = all(torch.equal(out, self._expected(256, seed)) for seed, out in enumerate(outs))
        return [] if right else ["sums that follow each other differ"]

    def _check_norm(self) -> list[str]:
        m, h = 3, self.capacity // 64
        x = self._parts(m * h, 9)[self.rank].to(self.machine.device).reshape(m, h)
        residual, weight = torch.ones_like(x), torch.full((h,), 2.0, device=x.device).to(torch.bfloat16)
        out = self.machine.empty(m, h)
        self.peers.all_reduce_add_rms_norm(x, residual, weight, 1e-5, out)
        total = (self._expected(m * h, 9).reshape(m, h).float() + 1).to(torch.bfloat16)
        wide = total.double()
        expected = 2 * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        wrong = [] if torch.equal(residual, total) else ["the residual differs"]
        if float((out.double() - expected).abs().max()) > float(expected.abs().max()) * 2**-7:
            wrong.append("the norm differs")
        return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=int, default=4)
    add_options(parser)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank is None:
        wrong = check_ranks(asked.world, asked.emulated)
        show({"all-reduce between processes": {"ranks": asked.world, "wrong": wrong}}, asked.json)
        return 1 if wrong else 0
    with open_machine(asked.emulated) as machine:
        wrong = Rank(machine, asked.rank, asked.world, asked.meeting).check()
    print("; ".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

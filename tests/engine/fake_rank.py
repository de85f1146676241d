"""A rank as a process, without a model: real sockets, real handshake, tokens from fakes.RankMirror.

`python -m tests.engine.fake_rank <behaviour> <run_dir> <rank>`; behaviours are listed in `main`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback

import msgspec
import zmq

from engine.channels import Codec, RunDirectory, open_socket
from engine.config import read_config
from engine.messages import (
    FromWorker,
    RankFailed,
    RankHello,
    RankLoaded,
    RankReady,
    StartServing,
    StepPlan,
    StopServing,
    ToWorker,
)
from engine.process import begin_child
from engine.status_page import Heart, Phase, StatusPage
from tests.engine.fakes import RankMirror

VOCAB_SIZE = 50_000


class FakeRank:
    def __init__(self, run: RunDirectory, rank: int, behaviour: str) -> None:
        self.config, self.rank, self.behaviour = read_config(run.config), rank, behaviour
        self.heart = Heart(StatusPage(run.status_page, self.config.tensor_parallel_size), rank, os.getpid())
        context = zmq.Context()
        self.plans = open_socket(context, zmq.PULL, run.plan_address(rank), bind=False)
        self.results = open_socket(context, zmq.XPUB, run.results_address, bind=False)
        self.results.setsockopt(zmq.LINGER, 1000)
        self.incoming: Codec[ToWorker] = Codec(ToWorker)
        self.outgoing: Codec[FromWorker] = Codec(FromWorker)

    def serve(self) -> None:
        self.heart.beat(phase=Phase.STARTING)
        assert self.results.recv()[:1] == b"\1"
        self.send(RankHello(self.rank, os.getpid()))
        self.load()
        start = self.receive()
        assert isinstance(start, StartServing)
        self.mirror = RankMirror(start.num_blocks, self.config.block_size, VOCAB_SIZE, check_slots=False)
        self.heart.beat(phase=Phase.READY)
        self.send(RankReady(self.rank))
        while not isinstance(message := self.receive(), StopServing):
            assert isinstance(message, StepPlan)
            self.step(message)

    def load(self) -> None:
        self.heart.beat(phase=Phase.LOADING, bytes_loaded=0, bytes_total=1000)
        if self.behaviour == "load-for-ever":
            self.wait_for_ever()
        self.heart.beat(bytes_loaded=1000)
        sizes = {"little-memory": 3, "big-memory": 1 << 16, "device": 1 << 16}
        max_blocks = sizes.get(self.behaviour, 64 + self.rank)
        self.send(RankLoaded(self.rank, max_blocks, 1000, 0.0, "fake"))

    def step(self, plan: StepPlan) -> None:
        self.heart.beat(phase=Phase.RUNNING, step=plan.step)
        if self.rank == self.config.tensor_parallel_size - 1 and plan.has_work:
            self.misbehave()
        elif self.behaviour in ("die", "fail", "freeze") and plan.has_work:
            self.wait_for_ever()  # as in a collective that the last rank does not join
        result = self.mirror.run(plan)
        if self.rank == 0:
            if seconds := {"slow": 0.02, "device": 0.005}.get(self.behaviour):
                time.sleep(seconds)
            self.send(msgspec.structs.replace(result, compute_seconds=time.perf_counter() - self.arrived))
        self.heart.beat(phase=Phase.READY)

    def misbehave(self) -> None:
        """What the last rank does when it gets work."""
        if self.behaviour == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.behaviour == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.behaviour == "fail":
            raise ValueError("the numbers are wrong")

    def wait_for_ever(self) -> None:
        while True:
            self.heart.beat()
            time.sleep(0.05)

    def receive(self) -> ToWorker:
        while not self.plans.poll(100):
            self.heart.beat()
        self.arrived = time.perf_counter()  # of a plan; reading it is the rank's work too
        return self.incoming.decode(self.plans.recv())

    def send(self, message: FromWorker) -> None:
        self.results.send(self.outgoing.encode(message))


def main(behaviour: str, run_directory: str, rank: str) -> int:
    """Behaviours: well, slow, device, die, freeze, fail, load-for-ever, die-early, {little,big}-memory."""
    begin_child(f"rank {rank}")
    if behaviour == "die-early" and rank == "1":
        print("this machine has no soul", file=sys.stderr)
        return 3
    fake = FakeRank(RunDirectory(run_directory), int(rank), behaviour)
    try:
        fake.serve()
        return 0
    except Exception as error:
        fake.send(RankFailed(int(rank), fake.heart._status.step, str(error), traceback.format_exc()))
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""How a rank comes by its GPU: a driver, a framework built for it, and the other ranks.

Whatever is missing is one sentence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec

import numpy as np

import cuda_ops
from cuda_ops.peer_group import HANDLE_BYTES
from engine.config import ServerConfig
from engine.errors import ConfigError
from workers.device.base import Group
from workers.device.driver import Driver
from workers.device.gpu import GpuDevice
from workers.device.gpu_group import GpuGroup, Peers, exchange
from workers.device.nccl import Nccl
from workers.device.op_watch import checked, wants_checked_ops, watched_ops

_MOST_PEERS = 8
_LARGEST_SUM = 2 << 20  # elements that ranks sum at once; a larger sum takes several turns

log = logging.getLogger(__name__)
_until_exit = ExitStack()  # ops stay watched as long as the process lives


def open_gpu(config: ServerConfig, rank: int, open_group: Callable[[], Group | None]) -> GpuDevice:
    """Rank `rank`'s GPU, in touch with the other ranks'. Raises ConfigError in words."""
    world = config.tensor_parallel_size
    driver = Driver(rank)
    device = gpu_class(config.framework)(driver, rank, world)
    if (host := open_group()) is not None:
        peers = open_peers(host, rank, world)
        device.join(GpuGroup(host, Nccl(), peers, rank, world, device.stream))
    device.can_record = config.gpu_graphs
    if wants_checked_ops():
        device.can_record = False  # nobody knows which op of a graph failed
        _until_exit.enter_context(watched_ops(checked(device.synchronize)))
    return device


def gpu_class(framework: str) -> type[GpuDevice]:
    """The device of the framework that is named, or of the first one here that computes on GPUs."""
    if framework in ("auto", "paddle") and find_spec("paddle"):
        from workers.device.paddle_gpu import PaddleGpu, has_cuda

        if has_cuda():
            return PaddleGpu
    if framework in ("auto", "torch") and find_spec("torch"):
        from workers.device.torch_gpu import TorchGpu, has_cuda

        if has_cuda():
            return TorchGpu
    names = {"paddle": "PaddlePaddle", "torch": "PyTorch"}
    raise ConfigError(
        f"--device gpu needs {names.get(framework, 'PaddlePaddle or PyTorch')} built for CUDA, and there is "
        "none here: see OCTET_PADDLE in ./run.sh help, or say --device cpu"
    )


def open_peers(host: Group, rank: int, world: int) -> Peers | None:
    """Sums through memory that ranks map from each other; None, on every rank, where one of them cannot.

    Every rank makes the same calls on `host`, whatever fails.
    """
    if world > _MOST_PEERS:
        return None
    has_exchanged, peers = False, None

    def give(own: np.ndarray) -> np.ndarray:
        nonlocal has_exchanged
        has_exchanged = True
        return exchange(host, own, world)

    try:
        peers = cuda_ops.PeerGroup(rank, world, _LARGEST_SUM, give)
    except (RuntimeError, ValueError) as error:
        log.warning(
            "sums go through NCCL, whose order varies: ranks cannot map each other's memory: %s", error
        )
    if not has_exchanged:
        give(np.zeros(HANDLE_BYTES, np.uint8))
    if exchange(host, np.array([peers is not None], np.uint8), world).all():
        return peers
    if peers is not None:
        peers.close()
    return None

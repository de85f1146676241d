"""The seam between the workers and a tensor framework; nothing outside this folder imports one."""

from __future__ import annotations

from collections.abc import Callable

from engine.config import ServerConfig
from workers.device.base import Device, Group


def open_device(config: ServerConfig, rank: int, open_group: Callable[[], Group | None]) -> Device:
    """The device that `--device` and `--framework` name, for one rank.

    Imports the framework, which takes seconds. `open_group` is called after that, because opening a group may
    load the ops, and the framework has to come before them (see paddle.py on what they would load otherwise).
    """
    if config.device == "gpu":
        from workers.device.open_gpu import open_gpu

        return open_gpu(config, rank, open_group)
    if config.framework == "torch":
        from workers.device.torch import TorchCpu

        return TorchCpu(rank, config.tensor_parallel_size, open_group())
    from workers.device.paddle import PaddleCpu

    return PaddleCpu(rank, config.tensor_parallel_size, open_group())

"""The seam between the workers and a tensor framework; nothing outside this folder imports one."""

from __future__ import annotations

from collections.abc import Callable

from engine.config import ServerConfig
from engine.errors import ConfigError
from workers.device.base import Device, Group


def open_device(config: ServerConfig, rank: int, open_group: Callable[[], Group | None]) -> Device:
    """The device that `--device` names, for one rank. Imports its framework, which takes seconds.

    `open_group` is called after that, because opening a group may load the ops, and the framework has to
    come before them (see paddle.py on what the ops would load otherwise).
    """
    if config.device == "gpu":
        raise ConfigError("--device gpu: this version computes on the CPU; leave --device out or say cpu.")
    from workers.device.paddle import PaddleCpu

    return PaddleCpu(rank, config.tensor_parallel_size, open_group())

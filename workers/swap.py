"""KV blocks in host memory: the copies that a plan asks for, made before its step computes.

Which block lies where is the engine's business (engine/swap_tier.py), which also says why this order is safe:
all blocks go out, then all come in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.config import ServerConfig
from engine.model_config import ModelConfig
from workers.device.base import Device, DtypeName, Tensor
from workers.kv_cache import KvCache, block_bytes
from workers.parallel import Share

Copies = Sequence[tuple[int, int]]  # from, to


@dataclass(frozen=True, slots=True)
class SwapStats:
    num_blocks: int = 0  # copied, out and in
    seconds: float = 0.0


class SwapSpace:
    """Room for `num_blocks` blocks of this rank's keys and values, bit for bit as on the device."""

    def __init__(self, device: Device, kv: KvCache, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._device = device
        layers = kv.layers if num_blocks else []
        self._tensors: list[Tensor] = [tensor for layer in layers for tensor in layer]
        self._host = [self._allocate(tensor) for tensor in self._tensors]

    def copy(self, out: Copies, back: Copies) -> SwapStats:
        """`out` has pairs of block and place, `back` of place and block; done when this returns."""
        if not out and not back:
            return SwapStats()
        began = time.perf_counter()
        for tensor, host in zip(self._tensors, self._host, strict=True):
            for block, place in out:
                host[place] = self._device.host_bits(tensor[block : block + 1])[0]
        for tensor, host in zip(self._tensors, self._host, strict=True):
            for place, block in back:
                self._device.write(tensor[block : block + 1], host[place : place + 1])
        self._device.synchronize()
        return SwapStats(len(out) + len(back), time.perf_counter() - began)

    def _allocate(self, tensor: Tensor) -> np.ndarray:
        """[num_blocks, ...one block], bf16 as uint16. The system gives the memory when it is first used."""
        one = self._device.host_bits(tensor[0:1])
        return np.empty((self.num_blocks, *one.shape[1:]), one.dtype)


def host_blocks_that_fit(config: ServerConfig, model: ModelConfig, share: Share, dtype: DtypeName) -> int:
    """How many blocks each rank keeps of `config.swap_space` bytes over all ranks."""
    return config.swap_space // (block_bytes(model, share, dtype, config.block_size) * share.world)

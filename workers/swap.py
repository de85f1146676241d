"""KV blocks in host memory: the copies that a plan asks for, made before its step computes.

Which block lies where is the engine's business (engine/swap_tier.py), which also says why this order is safe:
all blocks go out, then all come in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import ServerConfig
from engine.model_config import ModelConfig
from workers.device.base import Device, DtypeName, Tensor
from workers.device.host import bytes_of
from workers.kv_cache import KvCache, block_bytes
from workers.parallel import Share

Copies = Sequence[tuple[int, int]]  # from, to


@dataclass(frozen=True, slots=True)
class SwapStats:
    num_blocks: int = 0  # copied, out and in
    seconds: float = 0.0  # that the copies take, also where nobody waits for them


_NO_SWAP = SwapStats()


class SwapSpace:
    """Room for `num_blocks` blocks of this rank's keys and values, bit for bit as on the device.

    On a GPU copies are issued and not waited for: what comes after them on the stream finds them done.
    """

    def __init__(self, device: Device, kv: KvCache, num_blocks: int) -> None:
        layers = kv.layers if num_blocks else []
        self._tensors: list[Tensor] = [tensor for layer in layers for tensor in layer]
        self._block_bytes = [bytes_of(tensor[0:1]) for tensor in self._tensors]
        self._starts = [num_blocks * sum(self._block_bytes[:i]) for i in range(len(self._tensors))]
        self._store = device.host_store(num_blocks * sum(self._block_bytes))
        self._block_seconds = self._time_one_block(device) if device.is_gpu and num_blocks else 0.0

    def copy(self, out: Copies, back: Copies) -> SwapStats:
        """`out` has pairs of block and place, `back` of place and block."""
        if not out and not back:
            return _NO_SWAP
        began = time.perf_counter()
        parts = list(zip(self._tensors, self._starts, self._block_bytes, strict=True))
        for block, place, count in runs(out):
            for tensor, start, size in parts:
                self._store.save(tensor[block : block + count], start + place * size)
        for place, block, count in runs(back):
            for tensor, start, size in parts:
                self._store.load(tensor[block : block + count], start + place * size)
        count, elapsed = len(out) + len(back), time.perf_counter() - began
        return SwapStats(count, max(elapsed, count * self._block_seconds))

    def _time_one_block(self, device: Device) -> float:
        """Seconds of a copy, the second of two; what the engine weighs against computing the block again."""
        for _ in range(2):
            began = time.perf_counter()
            for tensor, start in zip(self._tensors, self._starts, strict=True):
                self._store.save(tensor[0:1], start)
            device.synchronize()
        return time.perf_counter() - began


def runs(copies: Copies) -> list[tuple[int, int, int]]:
    """(from, to, count): pairs that follow one another on both sides are one copy."""
    found: list[tuple[int, int, int]] = []
    for source, target in copies:
        if found and (source, target) == (found[-1][0] + found[-1][2], found[-1][1] + found[-1][2]):
            found[-1] = (*found[-1][:2], found[-1][2] + 1)
        else:
            found.append((source, target, 1))
    return found


def host_blocks_that_fit(config: ServerConfig, model: ModelConfig, share: Share, dtype: DtypeName) -> int:
    """How many blocks each rank keeps of `config.swap_space` bytes over all ranks."""
    return config.swap_space // (block_bytes(model, share, dtype, config.block_size) * share.world)

"""The KV tensors of one rank, and how many blocks fit.

Which sequence holds which block is the engine's business; here a block is only a place. Slots that were never
written hold arbitrary bits, NaN included. An int8 cache has a bf16 scale per token and head beside it, by the
rule in cuda_ops/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.model_config import ModelConfig
from workers.device.base import BYTES_PER_ELEMENT, Device, DtypeName, Tensor
from workers.lasting_memory import lasting
from workers.parallel import Share

_SCALE_DTYPE: DtypeName = "bfloat16"


@dataclass(slots=True)
class KvCache:
    """Keys and values of every layer: [num_blocks, kv heads of this rank, block_size, head_dim].

    Of an int8 cache each layer also has the scales of its keys and of its values, [num_blocks, kv heads,
    block_size] bf16.
    """

    layers: list[tuple[Tensor, ...]]

    @property
    def block_size(self) -> int:
        return int(self.layers[0][0].shape[2])

    @property
    def num_tokens(self) -> int:
        """Tokens for which there are places."""
        return int(self.layers[0][0].shape[0]) * self.block_size

    @classmethod
    def allocate(
        cls,
        device: Device,
        model: ModelConfig,
        share: Share,
        dtype: DtypeName,
        num_blocks: int,
        block_size: int,
    ) -> KvCache:
        """`dtype` is that of keys and values: the activations' or int8."""
        slots = (num_blocks, share.num_kv_heads, block_size)
        parts: list[tuple[tuple[int, ...], DtypeName]] = [((*slots, model.head_dim), dtype)] * 2
        if dtype == "int8":
            parts += [(slots, _SCALE_DTYPE)] * 2
        return cls([tuple(lasting(device, *part) for part in parts) for _ in range(model.num_layers)])


def block_bytes(model: ModelConfig, share: Share, dtype: DtypeName, block_size: int) -> int:
    """Bytes of one block on one rank: keys and values of all layers, with their scales."""
    per_head = model.head_dim * BYTES_PER_ELEMENT[dtype]
    if dtype == "int8":
        per_head += BYTES_PER_ELEMENT[_SCALE_DTYPE]
    return 2 * model.num_layers * share.num_kv_heads * per_head * block_size


def blocks_that_fit(config: ServerConfig, model: ModelConfig, share: Share, dtype: DtypeName) -> int:
    """How many blocks each rank holds of `config.kv_cache_memory` bytes over all ranks.

    The memory plan has filled that in where no flag did (engine/plan_server.py), so all ranks get the
    same answer. Raises ConfigError when it is less than one block.
    """
    bytes_of_one = block_bytes(model, share, dtype, config.block_size) * share.world
    if config.kv_cache_memory < bytes_of_one:
        raise ConfigError(
            f"--kv-cache-memory {config.kv_cache_memory} holds not even one block of {bytes_of_one} bytes; "
            "give at least that."
        )
    return config.kv_cache_memory // bytes_of_one

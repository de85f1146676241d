"""The KV tensors of one rank, and how many blocks fit.

Which sequence holds which block is the engine's business; here a block is only a place. Slots that were never
written hold arbitrary bits, NaN included.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.model_config import ModelConfig
from workers.device.base import BYTES_PER_ELEMENT, Device, DtypeName, Tensor
from workers.parallel import Share

DEFAULT_CPU_BYTES = 4 << 30  # over all ranks, unless one sequence of full length needs more
MAX_SHARE_OF_RAM = 0.5  # of what that one sequence may take


@dataclass(slots=True)
class KvCache:
    """Keys and values of every layer: [num_blocks, kv heads of this rank, block_size, head_dim]."""

    layers: list[tuple[Tensor, Tensor]]

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
        shape = (num_blocks, share.num_kv_heads, block_size, model.head_dim)
        return cls(
            [(device.empty(shape, dtype), device.empty(shape, dtype)) for _ in range(model.num_layers)]
        )


def block_bytes(model: ModelConfig, share: Share, dtype: DtypeName, block_size: int) -> int:
    """Bytes of one block on one rank: keys and values of all layers."""
    per_token = 2 * model.num_layers * share.num_kv_heads * model.head_dim * BYTES_PER_ELEMENT[dtype]
    return per_token * block_size


def blocks_that_fit(
    config: ServerConfig, model: ModelConfig, share: Share, dtype: DtypeName, host_bytes: int
) -> int:
    """How many blocks each CPU rank should hold; all ranks get the same answer.

    `--kv-cache-memory` bytes over all ranks if given. Otherwise enough for every sequence at full length but
    at most DEFAULT_CPU_BYTES, and never less than one sequence of full length.
    Raises ConfigError when that does not fit in `host_bytes` of memory.
    """
    bytes_of_one = block_bytes(model, share, dtype, config.block_size) * share.world
    max_model_len = config.max_model_len or model.max_position_embeddings
    blocks_per_sequence = -(-max_model_len // config.block_size)
    bytes_per_sequence = blocks_per_sequence * bytes_of_one
    if config.kv_cache_memory:
        return _blocks_of_given_memory(config.kv_cache_memory, bytes_of_one)
    if bytes_per_sequence > host_bytes * MAX_SHARE_OF_RAM:
        raise ConfigError(
            f"The KV cache of one sequence of {max_model_len} tokens takes {_gib(bytes_per_sequence)}, "
            f"more than half of this machine's {_gib(host_bytes)}. "
            f"Lower --max-model-len, or set --kv-cache-memory to what it may take."
        )
    wanted = config.max_num_seqs * blocks_per_sequence
    return max(min(wanted, DEFAULT_CPU_BYTES // bytes_of_one), blocks_per_sequence)


def _blocks_of_given_memory(given: int, bytes_of_one: int) -> int:
    if given < bytes_of_one:
        raise ConfigError(
            f"--kv-cache-memory {given} holds not even one block of {bytes_of_one} bytes; give at least that."
        )
    return given // bytes_of_one


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"

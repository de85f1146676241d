"""Whether a model fits, and what fits beside it: bytes per rank, from numbers alone.

    usable memory of a rank
      - its process          plan_machine.py
      - weights              plan_weights.py
      - a step's buffers     plan_activations.py, on a GPU also plan_gpu.py
      - vision peak          plan_activations.py
      - image cache          as much as --image-cache says; none for text models
      - swap space           as much as --swap-space says, on a host; beside a GPU it is no memory of the rank
      = room for KV blocks

The server sizes its KV cache with this and refuses with it; `./run.sh plan` prints it for machines that are
elsewhere. As table and JSON it is in plan_report.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from engine.config import Quantization, ServerConfig
from engine.errors import ConfigError
from engine.model_config import ModelConfig, check_tensor_parallel
from engine.plan_activations import largest_media_patches, step_bytes, vision_bytes
from engine.plan_gpu import driver_bytes, gpu_step_bytes
from engine.plan_machine import Machine
from engine.plan_weights import Dtype, KvDtype, kv_bytes_per_token, kv_dtype_of, weight_bytes

SHORTEST_CONTEXT = 2048  # below this a context that nobody asked for is not worth serving
_WORLDS = (1, 2, 4, 8, 16)
_QUANTIZATIONS: tuple[Quantization, ...] = ("bfloat16", "wint8", "wint4", "wint4-all")
_MODEST_KV = 4 << 30  # a host's memory is not ours alone: beyond this its KV cache takes half of what is free


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank; all ranks are alike. Tokens and blocks are those of the whole server."""

    machine: Machine
    world: int
    quantization: Quantization
    max_model_len: int
    max_num_seqs: int
    step_tokens: int
    block_size: int
    usable: int  # what the rank may fill
    process: int
    weights: dict[str, int]  # by component
    step: int
    vision: int
    image_cache: int
    swap_space: int  # for KV blocks, where the host's memory is the device's
    kv_dtype: KvDtype
    block_bytes: int  # of one KV block
    given_kv: int  # what --kv-cache-memory asks for; 0: chosen here

    @property
    def weight_total(self) -> int:
        return sum(self.weights.values())

    @property
    def room(self) -> int:
        """What weights and buffers leave for KV blocks; negative when they do not fit themselves."""
        taken = self.process + self.weight_total + self.step + self.vision
        return self.usable - taken - self.image_cache - self.swap_space

    @property
    def max_blocks(self) -> int:
        """KV blocks for which there is room."""
        return max(self.room, 0) // self.block_bytes

    @property
    def num_blocks(self) -> int:
        """KV blocks that the server takes."""
        if self.given_kv:
            return self.given_kv // self.block_bytes
        if not self.machine.is_host:
            return self.max_blocks
        modest = max(_MODEST_KV // self.world, self.room // 2) // self.block_bytes
        wanted = min(self.max_num_seqs * self.blocks_per_sequence, max(modest, self.blocks_per_sequence))
        return min(wanted, self.max_blocks)

    @property
    def blocks_per_sequence(self) -> int:
        """Of one sequence of full length."""
        return self.blocks_for(self.max_model_len)

    @property
    def fits(self) -> bool:
        """Whether there is room for everything and at least one sequence of full length."""
        return self.blocks_per_sequence <= self.num_blocks <= self.max_blocks

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def longest_context(self) -> int:
        """Tokens of the longest single sequence for which there is room, given memory or not."""
        blocks = min(self.num_blocks, self.max_blocks) if self.given_kv else self.max_blocks
        return blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def sequences_of(self, num_tokens: int) -> int:
        """How many sequences of this length fit at once."""
        return self.num_blocks // self.blocks_for(num_tokens)


def make_plan(config: ServerConfig, model: ModelConfig, machine: Machine) -> Plan:
    """The plan of settled settings (engine/settle.py). Raises ConfigError when ranks do not divide it.

    Also when the types of activations and KV cache do not go together.
    """
    world = config.tensor_parallel_size
    check_tensor_parallel(model, world)
    dtype: Dtype = model.dtype if config.dtype == "auto" else config.dtype
    kv_dtype = kv_dtype_of(config, dtype)
    step_tokens = config.max_num_batched_tokens
    samples = min(config.max_num_seqs, step_tokens)
    patches = largest_media_patches(model.vision, config.mm_processor_kwargs)
    weights = weight_bytes(model, world, config.quantization, dtype, is_host=machine.is_host)
    usable = machine.per_rank(world, config.gpu_memory_utilization)
    step = step_bytes(model, world, step_tokens, samples, dtype)
    if not machine.is_host:
        step += driver_bytes(model, world) + gpu_step_bytes(
            model,
            world,
            dtype,
            kv_dtype,
            num_tokens=step_tokens,
            num_sequences=samples,
            sequence_tokens=config.max_model_len,
            free=usable - sum(weights.values()),
        )
    return Plan(
        machine=machine,
        world=world,
        quantization=config.quantization,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        step_tokens=step_tokens,
        block_size=config.block_size,
        usable=usable,
        process=machine.rank_process,
        weights=weights,
        step=step,
        vision=vision_bytes(model, patches, dtype),
        image_cache=config.image_cache if model.vision is not None else 0,
        swap_space=config.swap_space // world if machine.is_host else 0,
        kv_dtype=kv_dtype,
        block_bytes=kv_bytes_per_token(model, world, kv_dtype) * config.block_size,
        given_kv=config.kv_cache_memory // world,
    )


def alternatives(config: ServerConfig, model: ModelConfig, machine: Machine) -> Iterator[Plan]:
    """Plans with another quantisation or number of ranks that hold the weights and a context worth serving.

    The nearest to what was asked come first. Ranks on a host share its memory, so there more do not help.
    """
    here = _QUANTIZATIONS.index(config.quantization)
    worlds = [config.tensor_parallel_size]
    if not machine.is_host:
        worlds += [world for world in _WORLDS if world > config.tensor_parallel_size]
    for world in worlds:
        for quantization in _QUANTIZATIONS[here if world > worlds[0] else here + 1 :]:
            settings = {"tensor_parallel_size": world, "quantization": quantization}
            try:
                plan = make_plan(msgspec.structs.replace(config, **settings), model, machine)
            except ConfigError:  # this many ranks do not divide the model
                continue
            if plan.fits or plan.longest_context >= SHORTEST_CONTEXT:
                yield plan

"""A memory plan for people and for programs: the whole table, the short one of a starting server, JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from engine.plan import Plan

_LENGTHS = (2048, 8192, 32768, 131072)


def table(plan: Plan, others: Iterable[Plan] = ()) -> str:
    """Every component, what is left, how many sequences that holds, and what would fit instead."""
    lines = [_heading(plan), ""]
    lines += _rows([(name, count) for name, count in plan.weights.items()], "weights", plan.weight_total)
    lines += _rows(_buffers(plan), "usable", plan.usable)
    lines += ["", _verdict(plan)]
    if plan.fits:
        lines += [f"  {_sequences(plan, length)}" for length in _shown_lengths(plan)]
    lines += _hints(plan, list(others))
    return "\n".join(lines)


def summary(plan: Plan) -> list[str]:
    """The compact table: two or three log lines."""
    parts = [("weights", plan.weight_total), *_buffers(plan)]
    sizes = ", ".join(f"{name} {gib(count)}" for name, count in parts)
    return [f"memory of a rank, of {gib(plan.usable)} usable: {sizes}", _verdict(plan)]


def refusal(plan: Plan, others: Iterable[Plan] = ()) -> str:
    """What a server says instead of starting."""
    return f"the model does not fit into memory with these settings\n{table(plan, others)}"


def as_json(plan: Plan, others: Iterable[Plan] = ()) -> dict[str, Any]:
    """Plain values; bytes are of one rank, tokens and sequences of the whole server."""
    return {
        "fits": plan.fits,
        "device": plan.machine.name,
        "tensor_parallel_size": plan.world,
        "quantization": plan.quantization,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.max_num_seqs,
        "bytes_per_rank": {
            "usable": plan.usable,
            "process": plan.process,
            "weights": plan.weight_total,
            "weights_by_component": plan.weights,
            "step": plan.step,
            "vision": plan.vision,
            "image_cache": plan.image_cache,
            "swap_space": plan.swap_space,
            "kv_cache": plan.num_blocks * plan.block_bytes,
            "room_for_kv_cache": plan.room,
        },
        "kv_cache": {
            "dtype": plan.kv_dtype,
            "blocks": plan.num_blocks,
            "block_size": plan.block_size,
            "tokens": plan.kv_tokens,
            "sequences": {str(length): plan.sequences_of(length) for length in _shown_lengths(plan)},
        },
        "largest": {
            "max_model_len": plan.longest_context,
            "sequences_of_max_model_len": plan.max_blocks // plan.blocks_per_sequence,
        },
        "alternatives": [
            {
                "tensor_parallel_size": other.world,
                "quantization": other.quantization,
                "max_model_len": min(other.longest_context, other.max_model_len),
            }
            for other in others
        ],
    }


def gib(count: int) -> str:
    """'27.19 GiB', or MiB below a tenth of one."""
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 2**30 / 10 else f"{count / 2**20:.2f} MiB"


def _heading(plan: Plan) -> str:
    ranks = "1 rank" if plan.world == 1 else f"{plan.world} ranks"
    machine = plan.machine
    where = f"on {machine.name}" if machine.is_host else f"on {machine.name} each"
    return (
        f"{ranks} {where} ({gib(machine.memory)}), {plan.quantization}; context {plan.max_model_len}, "
        f"{plan.max_num_seqs} sequences, steps of {plan.step_tokens} tokens. Bytes of one rank:"
    )


def _buffers(plan: Plan) -> list[tuple[str, int]]:
    parts = [
        ("process", plan.process),
        ("buffers of a step", plan.step),
        ("vision peak", plan.vision),
        ("image cache", plan.image_cache),
        ("swap space", plan.swap_space),
        ("KV cache", plan.num_blocks * plan.block_bytes),
    ]
    return [(name, count) for name, count in parts if count or name == "KV cache"]


def _rows(parts: Sequence[tuple[str, int]], total_name: str, total: int) -> list[str]:
    rows = [f"  {name:<18} {gib(count):>12}" for name, count in parts]
    return [*rows, f"{total_name:<20} {gib(total):>12}"]


def _verdict(plan: Plan) -> str:
    if plan.fits:
        kind = "int8 KV cache" if plan.kv_dtype == "int8" else "KV cache"
        return f"fits: {kind} of {plan.num_blocks} blocks, {plan.kv_tokens:,} tokens"
    if plan.room < 0:
        return f"does not fit: a rank lacks {gib(-plan.room)} for weights and buffers alone"
    if plan.given_kv and plan.num_blocks > plan.max_blocks:
        return (
            f"does not fit: --kv-cache-memory asks for {gib(plan.given_kv)} per rank, "
            f"there is room for {gib(plan.room)}"
        )
    needed = plan.blocks_per_sequence * plan.block_bytes
    room = min(plan.room, plan.given_kv or plan.room)
    return (
        f"does not fit: one sequence of {plan.max_model_len} tokens takes {gib(needed)} of KV cache per "
        f"rank, there is room for {gib(room)}"
    )


def _shown_lengths(plan: Plan) -> list[int]:
    shorter = [length for length in _LENGTHS if length < plan.max_model_len]
    return [*shorter, plan.max_model_len]


def _sequences(plan: Plan, length: int) -> str:
    return f"{plan.sequences_of(length):>8,} sequences of {length:,} tokens at once"


def _hints(plan: Plan, others: list[Plan]) -> list[str]:
    """The largest settings that would fit."""
    hints = []
    if not plan.fits and plan.longest_context:
        hints.append(f"--max-model-len {min(plan.longest_context, plan.max_model_len)}")
    hints += [_settings(other) for other in others]
    if plan.fits:
        more = plan.max_blocks * plan.block_bytes * plan.world
        if plan.max_blocks > plan.num_blocks:
            return [f"room for more: --kv-cache-memory {more >> 20}M would still fit"]
        return []
    return [f"would fit: {'; '.join(hints)}"] if hints else ["nothing near these settings fits"]


def _settings(plan: Plan) -> str:
    flags = f"--quant {plan.quantization} --tp {plan.world}"
    return flags if plan.fits else f"{flags} --max-model-len {plan.longest_context}"

"""What a starting server does with its memory plan: size the KV cache, shorten a context, or refuse.

Also whether its weights are large enough to be kept for the next start.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.model_source import cache_folder
from engine.plan import SHORTEST_CONTEXT, alternatives, make_plan
from engine.plan_checkpoint import decide_by_tensors
from engine.plan_machine import Machine
from engine.plan_report import refusal, summary

_SMALL_MODEL = 256 << 20  # bytes of weights below which a cache is not worth its files


def plan_server(
    config: ServerConfig, model: ModelConfig, machine: Machine, asked_context: int
) -> tuple[ServerConfig, list[str]]:
    """Settled settings with `kv_cache_memory` and `weight_cache` filled in, and the lines to log.

    `asked_context` is what --max-model-len said, 0 for nothing: then a context that does not fit is
    shortened to what does. Raises ConfigError with the whole table when there is no room.
    """
    model = decide_by_tensors(model, Path(config.model))
    plan, notes = make_plan(config, model, machine), []
    if not plan.fits and not asked_context and SHORTEST_CONTEXT <= plan.longest_context < plan.max_model_len:
        notes.append(
            f"the model's context of {plan.max_model_len} tokens does not fit beside its weights; serving "
            f"{plan.longest_context}. --max-model-len chooses another, ./run.sh plan shows what takes room"
        )
        config = msgspec.structs.replace(config, max_model_len=plan.longest_context)
        plan = make_plan(config, model, machine)
    if not plan.fits:
        raise ConfigError(refusal(plan, alternatives(config, model, machine)))
    kv_bytes = plan.num_blocks * plan.block_bytes * plan.world
    config = msgspec.structs.replace(
        config, kv_cache_memory=kv_bytes, weight_cache=weight_cache_of(config, plan.weight_total * plan.world)
    )
    return config, [*notes, *summary(plan)]


def weight_cache_of(config: ServerConfig, weight_bytes: int) -> str:
    """The folder that keeps the final weights, or "off".

    Random weights are made faster than they are read, and a small model is quantised in a moment: those are
    kept only where --weight-cache names a folder.
    """
    if config.weight_cache == "off":
        return "off"
    if config.weight_cache:
        return str(Path(config.weight_cache).expanduser().absolute())
    is_worth_it = config.load_format != "dummy" and weight_bytes >= _SMALL_MODEL
    return str((cache_folder() / "weights").absolute()) if is_worth_it else "off"

"""What the operator's settings mean for the model at hand: defaults filled in, contradictions found.

Done once, before any process starts; the children read the result and need not guess.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.model_config import ModelConfig, check_tensor_parallel, effective_quantization
from engine.model_source import default_name

_DEFAULT_STEP_TOKENS = 2048


def settle(config: ServerConfig, model: ModelConfig, folder: Path) -> tuple[ServerConfig, list[str]]:
    """The settings the children get, and log lines about those that had to give way.

    `folder` is the resolved model. Raises ConfigError when model and settings do not go together.
    """
    check_tensor_parallel(model, config.tensor_parallel_size)
    if config.swap_space and not config.enable_prefix_caching:
        raise ConfigError("--swap-space keeps blocks of the prefix cache: drop --no-enable-prefix-caching")
    max_model_len = _settle_context(config, model)
    step_tokens, notes = _settle_step(config, max_model_len)
    settled = msgspec.structs.replace(
        config,
        quantization=effective_quantization(model, config.quantization),
        model=str(folder),
        display_name=config.served_model_name or _name_of(config.model, folder),
        max_model_len=max_model_len,
        max_num_batched_tokens=step_tokens,
        tokenizer=str(Path(config.tokenizer).absolute()) if config.tokenizer else "",
        chat_template=str(Path(config.chat_template).absolute()) if config.chat_template else "",
    )
    return settled, notes


def _settle_context(config: ServerConfig, model: ModelConfig) -> int:
    longest = model.max_position_embeddings
    if config.max_model_len > longest:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is more than the model's context of {longest}"
        )
    return config.max_model_len or longest


def _settle_step(config: ServerConfig, max_model_len: int) -> tuple[int, list[str]]:
    """Without chunks the longest prompt has to fit into one step."""
    wanted = config.max_num_batched_tokens
    if config.enable_chunked_prefill or wanted >= max_model_len:
        return wanted or _DEFAULT_STEP_TOKENS, []
    if not wanted:
        return max(max_model_len, _DEFAULT_STEP_TOKENS), []
    note = (
        f"--max-num-batched-tokens {wanted} is raised to {max_model_len}, the context: "
        "with --no-enable-chunked-prefill the longest prompt has to fit into one step"
    )
    return max_model_len, [note]


def _name_of(typed: str, folder: Path) -> str:
    """The last part of what was typed, else of where that leads."""
    return Path(typed).name or folder.name if typed else default_name()

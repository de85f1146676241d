"""What a step takes on a GPU beside weights, KV cache and activations, from shapes."""

from __future__ import annotations

from dataclasses import dataclass

import cuda_ops
from engine.config import ServerConfig
from engine.model_config import ModelConfig
from workers.parallel import Share

_KEYS_PER_TASK = 256  # of a sequence that decodes: cuda_ops.attention_tasks


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step that the engine will plan."""

    num_tokens: int
    num_sequences: int
    num_sequence_tokens: int  # of one sequence, prompt and output

    @classmethod
    def of(cls, config: ServerConfig) -> StepLimits:
        return cls(config.max_num_batched_tokens, config.max_num_seqs, config.max_model_len)


def scratch_bytes(model: ModelConfig, share: Share, limits: StepLimits) -> int:
    """What the ops of a step share while they run; at least one."""
    sizes = [1, cuda_ops.sampling_workspace_bytes(limits.num_sequences, share.padded_vocab_size)]
    if model.num_experts:
        width = max(model.moe_intermediate_sizes) // share.world
        routing = (limits.num_tokens, model.hidden_size, model.num_pools, model.num_experts)
        experts = (limits.num_tokens, model.hidden_size, model.moe_top_k, width)
        sizes.append(cuda_ops.routing_workspace_bytes(*routing))
        sizes.append(cuda_ops.moe_workspace_bytes(*experts, model.num_pools * model.num_experts))
    return max(sizes)


def decode_tasks(num_sequences: int, num_tokens: int) -> int:
    """The most pieces of attention's work when so many sequences decode over `num_tokens` of KV together."""
    return num_sequences + num_tokens // _KEYS_PER_TASK

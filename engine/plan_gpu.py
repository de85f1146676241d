"""How many bytes one rank's GPU needs for a step beyond what a CPU needs: attention's lists, recorded steps.

Upper bounds from shapes: the lists and partial results of cuda_ops.AttentionPlan, once for steps that are
issued and once for recorded ones, and the buffers that recorded steps have to themselves (workers/graphs.py).
What the expert op and the sampler share while they run is counted in plan_activations.py.
"""

from __future__ import annotations

from engine.model_config import ModelConfig
from engine.plan_activations import step_bytes
from engine.plan_weights import Dtype, KvDtype, kv_bytes_per_token

# Attention of a sequence that decodes has a piece per so many keys, of so many rows; of a longer one too.
_SHORT_KEYS, _SHORT_ROWS = 256, 16
_LONG_KEYS, _LONG_ROWS = 4096, 128
_PIECE = 64  # bytes of a piece's entry in the list
_SHARED_PREFIXES = 2  # recorded steps allow for so many times the tokens that the KV cache holds
_GRAPH_NODE, _NODES_PER_LAYER = 2048, 16  # bytes of one recorded launch; launches of one layer
_GRAPHS = 32  # about as many are recorded
_PEER_BYTES = 16 << 20  # memory that ranks map from each other


def gpu_step_bytes(
    model: ModelConfig,
    world: int,
    dtype: Dtype,
    kv_dtype: KvDtype,
    *,
    num_tokens: int,
    num_sequences: int,
    sequence_tokens: int,
    free: int,
) -> int:
    """For steps of `num_tokens` or of `num_sequences` that decode; KV fills `free` bytes at most."""
    kv_heads = max(model.num_kv_heads // world, 1)
    partial = kv_heads * (model.head_dim + 2) * 4
    kv_tokens = _SHARED_PREFIXES * max(free, 0) // kv_bytes_per_token(model, world, kv_dtype)
    decoded = min(num_sequences * sequence_tokens, kv_tokens)
    short = (num_sequences + decoded // _SHORT_KEYS) * (_PIECE + _SHORT_ROWS * partial)

    rows = num_tokens * (model.num_heads // model.num_kv_heads)
    spans = -(-sequence_tokens // _LONG_KEYS)
    long = (num_sequences + -(-rows // _LONG_ROWS)) * spans * (_PIECE + _LONG_ROWS * partial)
    own_buffers = step_bytes(model, world, num_sequences, num_sequences, dtype)
    return 2 * short + long + own_buffers


def driver_bytes(model: ModelConfig, world: int) -> int:
    """What the driver keeps of recorded steps, and what ranks lend each other."""
    graphs = _GRAPHS * model.num_layers * _NODES_PER_LAYER * _GRAPH_NODE
    return graphs + (_PEER_BYTES if world > 1 else 0)

"""Every op, by name: the table of contents of this folder.

Importing this is cheap; the first call of an op loads the compiled library, and builds it where this machine
has none yet. Outputs are given by the caller and written in full; ids and lengths are int32 unless stated.
"""

from cuda_ops.attention import (
    AttentionPlan,
    attention_plan_bytes,
    attention_tasks,
    paged_attention,
    plan_attention,
    segment_attention,
)
from cuda_ops.device_library import emulated_device, set_stream, set_workspace
from cuda_ops.embedding import embed_tokens, scatter_rows
from cuda_ops.linear import add, bias_activation, cast, linear
from cuda_ops.moe import moe_experts, moe_workspace_bytes, route_experts, routing_workspace_bytes
from cuda_ops.norms import add_rms_norm, layer_norm, rms_norm, silu_mul
from cuda_ops.pack import can_pack, pack_panels
from cuda_ops.peer_group import PeerGroup
from cuda_ops.pixels import normalize_pixels
from cuda_ops.quantize import quantize_int4, quantize_int8
from cuda_ops.rope import rope_angles, rope_write_kv, vision_rope
from cuda_ops.sampling import SamplingBatch, sample_tokens, sampling_workspace_bytes
from cuda_ops.shared_memory_group import SharedMemoryGroup
from cuda_ops.threads import set_num_threads
from cuda_ops.tiled_weight import TiledWeight, router_parts, tile_router, tile_weight, tiled_shapes
from cuda_ops.weight import Weight

__all__ = [
    "AttentionPlan",
    "PeerGroup",
    "SamplingBatch",
    "SharedMemoryGroup",
    "TiledWeight",
    "Weight",
    "add",
    "add_rms_norm",
    "attention_plan_bytes",
    "attention_tasks",
    "bias_activation",
    "can_pack",
    "cast",
    "embed_tokens",
    "emulated_device",
    "layer_norm",
    "linear",
    "moe_experts",
    "moe_workspace_bytes",
    "normalize_pixels",
    "pack_panels",
    "paged_attention",
    "plan_attention",
    "quantize_int4",
    "quantize_int8",
    "rms_norm",
    "rope_angles",
    "rope_write_kv",
    "route_experts",
    "router_parts",
    "routing_workspace_bytes",
    "sample_tokens",
    "sampling_workspace_bytes",
    "scatter_rows",
    "segment_attention",
    "set_num_threads",
    "set_stream",
    "set_workspace",
    "silu_mul",
    "tile_router",
    "tile_weight",
    "tiled_shapes",
    "vision_rope",
]

"""Every op, by name: the table of contents of this folder.

Importing this is cheap; the first call of an op loads the compiled library, and builds it where this machine
has none yet. Outputs are given by the caller and written in full; ids and lengths are int32 unless stated.
"""

from cuda_ops.attention import paged_attention, segment_attention
from cuda_ops.embedding import embed_tokens, scatter_rows
from cuda_ops.linear import cast, linear
from cuda_ops.moe import moe_experts, route_experts
from cuda_ops.norms import add_rms_norm, layer_norm, rms_norm, silu_mul
from cuda_ops.pixels import normalize_pixels
from cuda_ops.quantize import quantize_int4, quantize_int8
from cuda_ops.rope import rope_angles, rope_write_kv, vision_rope
from cuda_ops.sampling import SamplingBatch, sample_tokens
from cuda_ops.shared_memory_group import SharedMemoryGroup
from cuda_ops.threads import set_num_threads
from cuda_ops.weight import Weight

__all__ = [
    "SamplingBatch",
    "SharedMemoryGroup",
    "Weight",
    "add_rms_norm",
    "cast",
    "embed_tokens",
    "layer_norm",
    "linear",
    "moe_experts",
    "normalize_pixels",
    "paged_attention",
    "quantize_int4",
    "quantize_int8",
    "rms_norm",
    "rope_angles",
    "rope_write_kv",
    "route_experts",
    "sample_tokens",
    "scatter_rows",
    "segment_attention",
    "set_num_threads",
    "silu_mul",
    "vision_rope",
]

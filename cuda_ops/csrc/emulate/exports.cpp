// emulate/exports.cpp   The address of every launcher under a C name, for cuda_ops/emulator.py
#include "../gpu/launchers.h"

#define EXPORT(name) \
  __attribute__((visibility("default"))) decltype(&octet::gpu::name) octet_gpu_##name = &octet::gpu::name;

extern "C" {

EXPORT(rms_norm)
EXPORT(add_rms_norm)
EXPORT(layer_norm)
EXPORT(silu_mul)
EXPORT(rope_angles)
EXPORT(rope_write_kv)
EXPORT(rope_write_int8)
EXPORT(vision_rope)
EXPORT(embed_tokens)
EXPORT(scatter_rows)
EXPORT(normalize_pixels)
EXPORT(cast)
EXPORT(feed_tokens)
EXPORT(repeat_block)
EXPORT(pack_weight)
EXPORT(linear)
EXPORT(router_parts)
EXPORT(route_experts)
EXPORT(moe_workspace_bytes)
EXPORT(moe_experts)
EXPORT(paged_attention_workspace_bytes)
EXPORT(plan_attention)
EXPORT(paged_attention)
EXPORT(paged_attention_int8)
EXPORT(segment_attention)
EXPORT(sampling_workspace_bytes)
EXPORT(sample_tokens)
EXPORT(bias_activation)
EXPORT(quantize_int8)
EXPORT(quantize_int4)
EXPORT(peer_region_bytes)
EXPORT(all_reduce)
EXPORT(all_reduce_add_rms_norm)

}  // extern "C"

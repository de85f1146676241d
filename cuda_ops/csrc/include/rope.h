// include/rope.h   Rotary embeddings of the decoder (with the KV write) and of the vision tower.
//
// A CUDA twin is declared beside each function in namespace octet::gpu, with a stream as first argument.

#pragma once

#include "../common/bf16.h"
#include "../common/status.h"

namespace octet::cpu {

// positions [3, M] (t, h, w), axis [pairs] in 0..2, inv_freq [pairs] -> cos_sin [M, pairs, 2] fp32
Status rope_angles(const int32_t* positions, const int32_t* axis, const float* inv_freq, float* cos_sin,
                   int64_t m, int64_t pairs);

struct KvShape {
  int64_t num_blocks, num_kv_heads, block_size, head_dim;
};

// k, v [num_blocks, num_kv_heads, block_size, head_dim] of the activations' type, or int8 with scales
// [num_blocks, num_kv_heads, block_size], which are null otherwise.
struct KvCache {
  void *k, *v;
  BF16 *k_scales, *v_scales;
};

// qkv [M, (num_heads + 2 * num_kv_heads) * head_dim] rows Q|K|V -> rotated q_out [M, num_heads, head_dim];
// rotated K and plain V into slots [M] of the cache.
Status rope_write_kv(DType type, const void* qkv, const float* cos_sin, const int32_t* slots,
                     const KvCache& cache, void* q_out, int64_t m, int64_t num_heads, const KvShape& kv);

// qkv [P, 3, heads, head_dim], q and k rotated in place; row_col [P, 2]
Status vision_rope(DType type, void* qkv, const int32_t* row_col, float theta, int64_t p, int64_t heads,
                   int64_t head_dim);

}  // namespace octet::cpu

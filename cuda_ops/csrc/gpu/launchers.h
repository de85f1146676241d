// gpu/launchers.h   The CUDA bodies: what each launcher takes. Twins of csrc/include, stream first.
//
// Argument meaning, shapes and order are those of the function with the same name in namespace octet::cpu
// (named beside each group); only what differs is said here. Launchers queue work on `stream` and return at
// once. No CUDA type appears, so host code may include this file without CUDA's headers.

#pragma once

#include "../include/attention.h"
#include "../include/norms.h"
#include "../include/quantize.h"
#include "../include/rope.h"
#include "../include/sampling.h"
#include "grouped_linear.h"
#include "packed_weight.h"

namespace octet::gpu {

using Stream = void*;  // cudaStream_t

// include/norms.h. Rows are whole 16-byte pieces: h % 8 == 0, width % 8 == 0.
Status rms_norm(Stream stream, DType type, const void* x, const void* weight, float eps, void* out, int64_t m,
                int64_t h);
Status add_rms_norm(Stream stream, DType type, const void* x, void* residual, const void* weight, float eps,
                    void* out, int64_t m, int64_t h);
Status layer_norm(Stream stream, DType type, const void* x, const void* weight, const void* bias, float eps,
                  void* out, int64_t m, int64_t h);
Status silu_mul(Stream stream, DType type, const void* gate_up, void* out, int64_t m, int64_t width);

// include/rope.h. A slot of -1 (a padding row of a captured graph) writes no cache; nothing is checked on
// the device. head_dim % 8 == 0.
Status rope_angles(Stream stream, const int32_t* positions, const int32_t* axis, const float* inv_freq,
                   float* cos_sin, int64_t m, int64_t pairs);
Status rope_write_kv(Stream stream, DType type, const void* qkv, const float* cos_sin, const int32_t* slots,
                     void* k_cache, void* v_cache, void* q_out, int64_t m, int64_t num_heads,
                     const octet::cpu::KvShape& kv);
Status vision_rope(Stream stream, DType type, void* qkv, const int32_t* row_col, float theta, int64_t p,
                   int64_t heads, int64_t head_dim);

// include/embedding.h and cast of include/linear.h. h % 8 == 0; rows outside of [0, m) are left out.
Status embed_tokens(Stream stream, DType type, const int32_t* ids, const void* table, int64_t vocab_start,
                    void* out, int64_t m, int64_t vocab_local, int64_t h);
Status scatter_rows(Stream stream, DType type, const void* source, const int32_t* rows, void* out, int64_t r,
                    int64_t m, int64_t h);
Status normalize_pixels(Stream stream, const uint8_t* patches, const float* mean, const float* std,
                        DType out_type, void* out, int64_t p, int64_t features);
Status cast(Stream stream, DType x_type, const void* x, DType out_type, void* out, int64_t size);

// include/repeat.h, width a multiple of 4
Status repeat_block(Stream stream, const uint8_t* block, int64_t rows, int64_t columns, int64_t first_row,
                    int64_t first_column, uint8_t* out, int64_t n, int64_t width);

// include/feedback.h
Status feed_tokens(Stream stream, const int32_t* sources, const int32_t* sampled, int64_t num_sampled,
                   int64_t vision_from, int32_t* token_ids, int32_t* token_types, int64_t m);

// source [count, N, K], kinds of WeightView -> packed.tiles and packed.scales, both the caller's: count *
// tile_bytes() and count * scale_bytes(). packed says shape, kind and gating; its kind is the source's.
Status pack_weight(Stream stream, const WeightView& source, int64_t count, const PackedWeight& packed);

// include/linear.h, x and bias bf16, w packed. A gated w gives silu(gate) * up, out [M, N / 2].
Status linear(Stream stream, const void* x, const PackedWeight& w, const void* bias, Activation activation,
              DType out_type, void* out, int64_t m);

// include/moe.h, x bf16. The routers of all pools are one matrix [P * E, H], cut in router_parts(H) equal
// parts of its columns, each packed as a matrix of a stack. logits [router_parts(H), M, P * E] fp32 is
// scratch.
int64_t router_parts(int64_t hidden);
Status route_experts(Stream stream, const void* x, const PackedWeight& router, const float* bias,
                     const int32_t* token_types, float norm_min, int32_t* expert_ids, float* expert_weights,
                     int64_t m, int64_t hidden, int64_t num_pools, int64_t num_experts, int64_t top_k,
                     float* logits);

// One pool: stacks of matrices, up_gate packed gated.
struct PackedExperts {
  PackedWeight up_gate, down;
};

// include/moe.h, x and out bf16, at most two pools. The workspace is scratch of moe_workspace_bytes.
int64_t moe_workspace_bytes(int64_t m, int64_t h, int64_t top_k, int64_t max_width, int64_t num_experts);
Status moe_experts(Stream stream, const void* x, const int32_t* expert_ids, const float* expert_weights,
                   const PackedExperts* pools, int64_t num_pools, int64_t experts_per_pool, void* out,
                   int64_t m, int64_t h, int64_t top_k, void* workspace);

// include/attention.h, bf16, caches of the paged kind. A sequence is short when its query tokens times the
// query heads of a KV head are at most 16 (decode), else long. Its tasks:
//   short   ceil(kv_len / 256)
//   long    ceil(rows / 128) * ceil(kv_len / 4096), rows = query tokens * query heads of a KV head
// The lists and the workspace are sized by the caller, who knows the batch or a bound of it; a captured
// graph keeps its bound. A batch beyond it is the caller's mistake and is not checked on the device.
struct AttentionLimits {
  int64_t short_tasks, long_tasks;
};
int64_t paged_attention_workspace_bytes(int64_t short_tasks, int64_t long_tasks, int64_t num_sequences,
                                        int64_t num_kv_heads, int64_t head_dim);
// Lists the tasks, once per step: every layer's paged_attention of that batch reads them. m is the rows of q.
Status plan_attention(Stream stream, const octet::cpu::PagedBatch& batch, int64_t m, int64_t num_heads,
                      const octet::cpu::KvShape& kv, const AttentionLimits& limits, void* workspace);
Status paged_attention(Stream stream, const void* q, const void* k_cache, const void* v_cache,
                       const octet::cpu::PagedBatch& batch, float scale, void* out, int64_t m,
                       int64_t num_heads, const octet::cpu::KvShape& kv, const AttentionLimits& limits,
                       void* workspace);

// The same over a cache of int8 (README.md of cuda_ops says how it is rounded); scales 16-byte aligned.
struct Int8Caches {
  int8_t *k, *v;              // [num_blocks, num_kv_heads, block_size, head_dim]
  BF16 *k_scales, *v_scales;  // [num_blocks, num_kv_heads, block_size]
};
Status rope_write_int8(Stream stream, const void* qkv, const float* cos_sin, const int32_t* slots,
                       const Int8Caches& caches, void* q_out, int64_t m, int64_t num_heads,
                       const octet::cpu::KvShape& kv);
Status paged_attention_int8(Stream stream, const void* q, const Int8Caches& caches,
                            const octet::cpu::PagedBatch& batch, float scale, void* out, int64_t m,
                            int64_t num_heads, const octet::cpu::KvShape& kv, const AttentionLimits& limits,
                            void* workspace);

Status segment_attention(Stream stream, const void* qkv, const int32_t* segment_starts, int64_t num_segments,
                         float scale, void* out, int64_t p, int64_t heads, int64_t head_dim);

// include/sampling.h. Ids of history and banned are not checked on the device; at most 512 top ids. The
// workspace is scratch of sampling_workspace_bytes.
int64_t sampling_workspace_bytes(int64_t num_rows, int64_t vocab);
Status sample_tokens(Stream stream, float* logits, const SamplingBatch& batch, const SamplingResult& result,
                     void* workspace);

// What follows a bf16 product of the framework: x [M, N] = activation(x + bias), in place; bias may be null.
Status bias_activation(Stream stream, DType type, void* x, const void* bias, Activation activation, int64_t m,
                       int64_t n);

// include/quantize.h; the plain layout, which pack_weight takes.
Status quantize_int8(Stream stream, DType type, const void* weight, int8_t* data, BF16* scales, int64_t n,
                     int64_t k);
Status quantize_int4(Stream stream, DType type, const void* weight, int64_t group, uint8_t* data,
                     BF16* scales, int64_t n, int64_t k);

// The memory that the ranks of a group map from each other: regions[r] is rank r's region of
// peer_region_bytes(capacity), zeroed before anyone's first call, as this process sees it (cudaIpc). Every
// rank makes the same calls in the same order; messages are bf16, up to `capacity` elements.
struct PeerGroup {
  void* regions[8];
  int32_t rank, world_size;
  int64_t capacity;
};
int64_t peer_region_bytes(int64_t capacity);
// out [size] = sum over ranks of x; out may be x.
Status all_reduce(Stream stream, const PeerGroup& group, const void* x, void* out, int64_t size);
// residual [M, H] += that sum, rounded; out = rms_norm(residual) as in include/norms.h
Status all_reduce_add_rms_norm(Stream stream, const PeerGroup& group, const void* x, void* residual,
                               const void* weight, float eps, void* out, int64_t m, int64_t h);

}  // namespace octet::gpu

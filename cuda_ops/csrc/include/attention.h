// include/attention.h   Causal attention over a paged KV cache, and full attention inside segments.
//
// A CUDA twin is declared beside each function in namespace octet::gpu, with a stream as first argument.

#pragma once

#include "../common/status.h"
#include "rope.h"

namespace octet::cpu {

// KV positions are taken in segments [0, 256), [256, 512), ... counted from a sequence's first token. Each
// has its own maximum, sum and weighted values; they are merged in ascending order. A twin must do the same
// with the same length: then cutting a prompt into chunks cannot change a bit.
constexpr int64_t kKvSegment = 256;

struct PagedBatch {
  const int32_t* block_tables;  // [num_sequences, max_blocks]
  const int32_t* query_starts;  // [num_sequences + 1] rows of q
  const int32_t* kv_lens;       // [num_sequences] tokens in the cache, this step's included
  int64_t num_sequences, max_blocks;
};

// q [M, num_heads, head_dim] -> out [M, num_heads * head_dim]; query i of a sequence sees the first
// kv_len - num_queries + i + 1 positions.
Status paged_attention(DType type, const void* q, const KvCache& cache, const PagedBatch& batch, float scale,
                       void* out, int64_t m, int64_t num_heads, const KvShape& kv);

// qkv [P, 3, heads, head_dim], segment_starts [num_segments + 1] -> out [P, heads * head_dim]
Status segment_attention(DType type, const void* qkv, const int32_t* segment_starts, int64_t num_segments,
                         float scale, void* out, int64_t p, int64_t heads, int64_t head_dim);

}  // namespace octet::cpu

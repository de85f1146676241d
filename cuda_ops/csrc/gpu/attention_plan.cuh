// gpu/attention_plan.cuh   Which warp or block attends to what, listed on the device once per step
//
// A short sequence (its rows fit sixteen: decode) is cut in segments of 256 keys, one warp each. A long one
// (prefill) in tiles of 128 rows x spans of 16 segments, one block each. A row is a query token and one of
// the query heads that share a KV head.
//
// Order: keys ascend inside a segment; segments merge ascending into their span, spans ascending into the
// row. Both kernels and the final merge keep to it, so a row has the same bits decoded, prefilled or cut.
// A list of tasks, not a grid: one launch serves any mix of lengths, and the host need not know them.

#pragma once

#include "elements.cuh"
#include "launchers.h"

namespace octet::gpu {

constexpr int kSegment = int(octet::cpu::kKvSegment);
constexpr int kSegmentsPerSpan = 16;
constexpr int kSpan = kSegment * kSegmentsPerSpan;
constexpr int kShortRows = 16, kLongRows = 128;

// The batch and the geometry, as kernels need them.
struct AttentionShape {
  const int32_t* block_tables;
  const int32_t* query_starts;
  const int32_t* kv_lens;
  int num_sequences, max_blocks, num_queries;
  int num_heads, num_kv_heads, block_shift;  // log2 of the block size
  float scale_log2;

  __device__ int heads_per_kv() const { return num_heads / num_kv_heads; }
};

struct SequenceWork {
  int first_query, num_queries, kv_len, num_rows;

  __device__ SequenceWork(const AttentionShape& s, int sequence) {
    first_query = s.query_starts[sequence];
    num_queries = s.query_starts[sequence + 1] - first_query;
    kv_len = s.kv_lens[sequence];
    num_rows = num_queries * s.heads_per_kv();
  }
  __device__ bool is_short() const { return num_rows <= kShortRows; }
  __device__ int num_segments() const { return (kv_len + kSegment - 1) / kSegment; }
  __device__ int num_spans() const { return (kv_len + kSpan - 1) / kSpan; }
  __device__ int row_tiles() const { return (num_rows + kLongRows - 1) / kLongRows; }
  __device__ bool is_idle() const { return num_queries <= 0 || kv_len <= 0; }
  __device__ int short_tasks() const { return !is_idle() && is_short() ? num_segments() : 0; }
  __device__ int long_tasks() const { return is_idle() || is_short() ? 0 : row_tiles() * num_spans(); }
  // Keys that a row may see.
  __device__ int visible(int row, int heads_per_kv) const {
    return kv_len - num_queries + row / heads_per_kv + 1;
  }
};

struct AttentionTask {
  int sequence;
  int part;  // short: segment; long: row tile * spans + span
};

// Views into the workspace. Partial results of task t: [kv head][rows] of head_dim + 2 floats each: the
// unnormalised output, then its sum and its largest score.
struct AttentionPlan {
  int* num_tasks;    // [2] short, long
  int* first_tasks;  // [num_sequences] of the sequence's tasks, in their list
  AttentionTask* tasks[2];
  float* partials[2];
};

// What lies where, in bytes from the begin of the workspace.
struct AttentionWorkspace {
  int64_t num_tasks, first_tasks, tasks[2], partials[2], size;

  AttentionWorkspace(const AttentionLimits& limits, int64_t num_sequences, int64_t num_kv_heads,
                     int64_t head_dim) {
    int64_t end = 0;
    const auto take = [&end](int64_t bytes) {
      const int64_t begin = end;
      end += ceil_div(bytes, 256) * 256;
      return begin;
    };
    num_tasks = take(8);
    first_tasks = take(num_sequences * 4);
    tasks[0] = take(limits.short_tasks * int64_t(sizeof(AttentionTask)));
    tasks[1] = take(limits.long_tasks * int64_t(sizeof(AttentionTask)));
    partials[0] = take(limits.short_tasks * num_kv_heads * kShortRows * (head_dim + 2) * 4);
    partials[1] = take(limits.long_tasks * num_kv_heads * kLongRows * (head_dim + 2) * 4);
    size = end;
  }

  AttentionPlan at(void* workspace) const {
    auto* base = static_cast<unsigned char*>(workspace);
    AttentionPlan plan;
    plan.num_tasks = reinterpret_cast<int*>(base + num_tasks);
    plan.first_tasks = reinterpret_cast<int*>(base + first_tasks);
    for (int i = 0; i < 2; ++i) {
      plan.tasks[i] = reinterpret_cast<AttentionTask*>(base + tasks[i]);
      plan.partials[i] = reinterpret_cast<float*>(base + partials[i]);
    }
    return plan;
  }
};

// The partial result of one row.
template <int head_dim>
__device__ __forceinline__ float* partial_row(const AttentionPlan& plan, bool is_long, int task, int kv_head,
                                              int num_kv_heads, int row) {
  const int64_t rows = is_long ? kLongRows : kShortRows;
  return (is_long ? plan.partials[1] : plan.partials[0]) +
         ((int64_t(task) * num_kv_heads + kv_head) * rows + row) * (head_dim + 2);
}

inline int log2_of(int64_t size) {
  int shift = 0;
  while ((int64_t(1) << shift) < size) ++shift;
  return shift;
}

inline AttentionShape shape_of(const octet::cpu::PagedBatch& batch, float scale, int64_t m, int64_t num_heads,
                               const octet::cpu::KvShape& kv) {
  return {batch.block_tables,       batch.query_starts,    batch.kv_lens,
          int(batch.num_sequences), int(batch.max_blocks), int(m),
          int(num_heads),           int(kv.num_kv_heads),  log2_of(kv.block_size),
          scale * 1.44269504f};
}

}  // namespace octet::gpu

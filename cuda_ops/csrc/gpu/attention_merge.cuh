// gpu/attention_merge.cuh   The partial results of a row made one: segments into spans, spans into the row
//
// The last step of paged_attention.cu. A span of a short sequence is up to 16 partial results, one of a long
// sequence is one; both come out as if a single pass had merged them ascending. Also writes the zeros of rows
// that attend to nothing.

#pragma once

#include "attention.cuh"
#include "attention_plan.cuh"

namespace octet::gpu {

constexpr int kMergeThreads = 256;

// The sequence a query token belongs to, or -1.
__device__ inline int sequence_of(const AttentionShape& s, int token) {
  if (token >= s.query_starts[s.num_sequences]) return -1;
  int low = 0, high = s.num_sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (s.query_starts[middle] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// A block per query token and head: warps merge a span each, then the spans are merged ascending.
template <int head_dim>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const AttentionShape shape, const AttentionPlan plan, bf16* out) {
  constexpr int warps = kMergeThreads / 32, columns = head_dim / 32;  // per lane
  OCTET_SHARED(float, spans, warps*(head_dim + 2));
  const int token = blockIdx.x, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  bf16* to = out + (int64_t(token) * shape.num_heads + head) * head_dim;
  const int sequence = sequence_of(shape, token);
  if (sequence < 0 || SequenceWork(shape, sequence).is_idle()) {
    for (int i = threadIdx.x; i < head_dim; i += kMergeThreads) store_one(to + i, 0);
    return;
  }
  const SequenceWork work(shape, sequence);
  const bool is_long = !work.is_short();
  const int num_spans = work.num_spans(), num_parts = is_long ? num_spans : work.num_segments();
  if (num_parts == 1) return;  // written whole
  const int group = shape.heads_per_kv(), kv_head = head / group;
  const int row = (token - work.first_query) * group + head % group;
  const int first = plan.first_tasks[sequence] + (is_long ? row / kLongRows * num_spans : 0);
  const int parts_per_span = is_long ? 1 : kSegmentsPerSpan;

  float total[columns] = {}, total_sum = 0, total_largest = -INFINITY;
  for (int turn = 0; turn < num_spans; turn += warps) {
    const int begin = (turn + warp) * parts_per_span, end = min(begin + parts_per_span, num_parts);
    float value[columns] = {}, sum = 0, largest = -INFINITY;
#pragma unroll 4
    for (int part = begin; part < end; ++part) {
      const float* from = partial_row<head_dim>(plan, is_long, first + part, kv_head, shape.num_kv_heads,
                                                is_long ? row % kLongRows : row);
      if (is_long) {
        sum = from[head_dim];
        largest = from[head_dim + 1];
        for (int c = 0; c < columns; ++c) value[c] = from[c * 32 + lane];
      } else {
        const Merge merge(largest, from[head_dim + 1]);
        sum = merge(sum, from[head_dim]);
        for (int c = 0; c < columns; ++c) value[c] = merge(value[c], from[c * 32 + lane]);
        largest = merge.largest;
      }
    }
    float* mine = spans + warp * (head_dim + 2);
    for (int c = 0; c < columns; ++c) mine[c * 32 + lane] = value[c];
    if (lane == 0) {
      mine[head_dim] = sum;
      mine[head_dim + 1] = largest;
    }
    __syncthreads();
    if (warp == 0) {
      for (int span = 0; span < min(warps, num_spans - turn); ++span) {
        const float* from = spans + span * (head_dim + 2);
        const Merge merge(total_largest, from[head_dim + 1]);
        total_sum = merge(total_sum, from[head_dim]);
        for (int c = 0; c < columns; ++c) total[c] = merge(total[c], from[c * 32 + lane]);
        total_largest = merge.largest;
      }
    }
    __syncthreads();
  }
  if (warp != 0) return;
  const float inverse = 1.0f / total_sum;
  for (int c = 0; c < columns; ++c) store_one(to + c * 32 + lane, total[c] * inverse);
}

}  // namespace octet::gpu

// gpu/attention_plan.cu   Lists who attends to what, once per step; see attention_plan.cuh
//
//   bytes   8 per task and 12 per sequence   -> a few us, before the first layer
//   map     one block; a thread per sequence counts its tasks, a running sum places them, the thread lists
//           them
//   needs   lists large enough for the batch (AttentionLimits)
//   order   sequences ascend, then parts ascend; results do not depend on it
//   source  our own                                               twin  none: the CPU body walks the batch
//   speed   not yet measured

#include "attention_plan.cuh"

namespace octet::gpu {
namespace {

constexpr int kPlanThreads = 256;

// The block's running sum before this thread; `total` is the whole.
__device__ int sum_before(int value, int& total) {
  OCTET_SHARED(int, warps, kPlanThreads / 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, inclusive, step);
    if (lane >= step) inclusive += before;
  }
  __syncthreads();
  if (lane == 31) warps[warp] = inclusive;
  __syncthreads();
  int before = inclusive - value;
  total = 0;
  for (int w = 0; w < kPlanThreads / 32; ++w) {
    if (w < warp) before += warps[w];
    total += warps[w];
  }
  return before;
}

__global__ void __launch_bounds__(kPlanThreads) plan_kernel(AttentionShape shape, AttentionPlan plan) {
  int done[2] = {0, 0};
  for (int first = 0; first < shape.num_sequences; first += kPlanThreads) {
    const int sequence = first + threadIdx.x;
    int counts[2] = {0, 0};
    if (sequence < shape.num_sequences) {
      const SequenceWork work(shape, sequence);
      counts[0] = work.short_tasks();
      counts[1] = work.long_tasks();
    }
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      int total;
      const int begin = done[kind] + sum_before(counts[kind], total);
      if (counts[kind]) plan.first_tasks[sequence] = begin;
      for (int i = 0; i < counts[kind]; ++i) plan.tasks[kind][begin + i] = {sequence, i};
      done[kind] += total;
    }
  }
  if (threadIdx.x == 0) {
    plan.num_tasks[0] = done[0];
    plan.num_tasks[1] = done[1];
  }
}

}  // namespace

int64_t paged_attention_workspace_bytes(int64_t short_tasks, int64_t long_tasks, int64_t num_sequences,
                                        int64_t num_kv_heads, int64_t head_dim) {
  return AttentionWorkspace({short_tasks, long_tasks}, num_sequences, num_kv_heads, head_dim).size;
}

Status plan_attention(Stream stream, const octet::cpu::PagedBatch& batch, int64_t m, int64_t num_heads,
                      const octet::cpu::KvShape& kv, const AttentionLimits& limits, void* workspace) {
  const AttentionWorkspace layout(limits, batch.num_sequences, kv.num_kv_heads, kv.head_dim);
  return launch({"plan_attention", 1, kPlanThreads, 0, stream}, plan_kernel,
                shape_of(batch, 0, m, num_heads, kv), layout.at(workspace));
}

}  // namespace octet::gpu

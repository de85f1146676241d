// gpu/moe.cu   The routed experts of both pools: sort rows by expert, two grouped products, ordered sum
//
//   out[i] = sum over j, in routing order, of w[i, j] * down_e(silu(gate_e(x_i)) * up_e(x_i)), e = ids[i, j]
//
//   x [M, H] bf16   ids, w [M, k]   up_gate [E, 2 width, H], down [E, H, width] per pool   out [M, H] bf16
//
//   bytes   weights of the experts met + 2 M k (H + width) activations + 8 M k H for the partial outputs
//           -> bandwidth bound by the weights up to hundreds of rows
//   map     dispatch: a thread per expert walks the pairs (i, j) in order, 1024 to a block
//           products: grouped_linear.cuh; the first reads x through the pairs (no gather), the second writes
//           each pair's fp32 output to its own place        combine: a thread per four columns
//   needs   H % 8 == 0, width % 8 == 0, at most 256 experts; ids of -1 are inert; M may be 0
//   order   pairs of an expert ascend; every sum's order depends on the row alone (grouped_linear.cuh), the
//           combine takes j ascending
//   source  Shazeer et al. 2017, arXiv:1701.06538; reading through the routing index as HPC-Ops does
//   twin    cpu/moe.cc
//   speed   not yet measured

#include <algorithm>

#include "elements.cuh"
#include "launchers.h"

namespace octet::gpu {
namespace {

constexpr int kChunk = 1024;  // pairs per dispatch block
constexpr int kThreads = 256;

struct Pairs {
  const int32_t* experts;  // [count] expert of pair i * k + j, -1 if inert
  int count, num_experts;
  int32_t* chunk_counts;  // [chunks][num_experts]
  int32_t* starts;        // [num_experts + 1]
  int32_t* sorted;        // [count] pairs by expert, ascending inside
};

__device__ int load_chunk(const Pairs& p, int chunk, int32_t* experts) {
  const int begin = chunk * kChunk, size = min(kChunk, p.count - begin);
  for (int i = threadIdx.x; i < size; i += kThreads) experts[i] = p.experts[begin + i];
  __syncthreads();
  return size;
}

__global__ void __launch_bounds__(kThreads) count_pairs_kernel(Pairs p) {
  OCTET_SHARED(int32_t, experts, kChunk);
  const int size = load_chunk(p, blockIdx.x, experts), expert = threadIdx.x;
  if (expert >= p.num_experts) return;
  int count = 0;
  for (int i = 0; i < size; ++i) count += experts[i] == expert;
  p.chunk_counts[int(blockIdx.x) * p.num_experts + expert] = count;
}

// Every block sums the chunks' counts again: a few KB from L2, and no block waits for another.
__global__ void __launch_bounds__(kThreads) place_pairs_kernel(Pairs p) {
  OCTET_SHARED(int32_t, experts, kChunk);
  OCTET_SHARED(int32_t, totals, kThreads);
  const int size = load_chunk(p, blockIdx.x, experts), expert = threadIdx.x;
  int total = 0, place = 0;
  if (expert < p.num_experts) {
    for (int chunk = 0; chunk < int(gridDim.x); ++chunk) {
      if (chunk == int(blockIdx.x)) place = total;
      total += p.chunk_counts[chunk * p.num_experts + expert];
    }
  }
  totals[expert] = total;
  __syncthreads();
  if (expert >= p.num_experts) return;
  int start = 0;
  for (int earlier = 0; earlier < expert; ++earlier) start += totals[earlier];
  if (blockIdx.x == 0) {
    p.starts[expert] = start;
    if (expert == p.num_experts - 1) p.starts[p.num_experts] = start + total;
  }
  place += start;
  for (int i = 0; i < size; ++i) {
    if (experts[i] == expert) p.sorted[place++] = int(blockIdx.x) * kChunk + i;
  }
}

__global__ void __launch_bounds__(kThreads)
    combine_kernel(const float* partial, const int32_t* experts, const float* weights, bf16* out,
                   int64_t num_pieces, int h, int top_k) {
  const int64_t piece = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (piece >= num_pieces) return;
  const int64_t token = piece * 4 / h, column = piece * 4 % h;
  float4 sum = make_float4(0, 0, 0, 0);
  for (int64_t pair = token * top_k; pair < (token + 1) * top_k; ++pair) {
    if (experts[pair] < 0) continue;
    const float weight = weights[pair];
    const float4 y = *reinterpret_cast<const float4*>(partial + pair * h + column);
    sum = make_float4(sum.x + weight * y.x, sum.y + weight * y.y, sum.z + weight * y.z, sum.w + weight * y.w);
  }
  *reinterpret_cast<uint2*>(out + token * h + column) =
      make_uint2(pack_bf16x2(sum.x, sum.y), pack_bf16x2(sum.z, sum.w));
}

// What lies where in the workspace.
struct Workspace {
  int64_t chunk_counts, starts, sorted, hidden, partial, size;  // bytes from its begin

  Workspace(int64_t m, int64_t h, int64_t top_k, int64_t max_width, int64_t num_experts) {
    const int64_t pairs = m * top_k, chunks = ceil_div(pairs, kChunk);
    int64_t end = 0;
    const auto take = [&end](int64_t bytes) {
      const int64_t begin = end;
      end += ceil_div(bytes, 256) * 256;
      return begin;
    };
    chunk_counts = take(chunks * num_experts * 4);
    starts = take((num_experts + 1) * 4);
    sorted = take(pairs * 4);
    hidden = take(pairs * max_width * 2);
    partial = take(pairs * h * 4);
    size = end;
  }
};

Status dispatch(Stream stream, const Pairs& pairs) {
  const dim3 chunks(unsigned(ceil_div(pairs.count, kChunk)));
  if (Status status = launch({"count_pairs", chunks, kThreads, 0, stream}, count_pairs_kernel, pairs))
    return status;
  return launch({"place_pairs", chunks, kThreads, 0, stream}, place_pairs_kernel, pairs);
}

}  // namespace

int64_t moe_workspace_bytes(int64_t m, int64_t h, int64_t top_k, int64_t max_width, int64_t num_experts) {
  return Workspace(m, h, top_k, max_width, num_experts).size;
}

Status moe_experts(Stream stream, const void* x, const int32_t* expert_ids, const float* expert_weights,
                   const PackedExperts* pools, int64_t num_pools, int64_t experts_per_pool, void* out,
                   int64_t m, int64_t h, int64_t top_k, void* workspace) {
  if (num_pools < 1 || num_pools > 2) return "there must be one pool of experts or two";
  if (num_pools * experts_per_pool > kThreads) return "there must be 1 to 256 experts";
  if (m * top_k * h >= int64_t(1) << 40 || m * top_k >= int64_t(1) << 31)
    return "too many tokens for one call";
  if (m == 0) return nullptr;
  int64_t max_width = 0;
  for (int64_t i = 0; i < num_pools; ++i) {
    if (!pools[i].up_gate.is_gated || pools[i].down.is_gated)
      return "up_gate must be packed gated, down plain";
    max_width = std::max<int64_t>(max_width, pools[i].down.in_features);
  }
  const Workspace at(m, h, top_k, max_width, num_pools * experts_per_pool);
  auto* base = static_cast<unsigned char*>(workspace);
  const auto ints = [base](int64_t offset) { return reinterpret_cast<int32_t*>(base + offset); };
  const Pairs pairs{expert_ids,      int(m * top_k), int(num_pools * experts_per_pool), ints(at.chunk_counts),
                    ints(at.starts), ints(at.sorted)};
  if (Status status = dispatch(stream, pairs)) return status;

  GroupedLinear p = {};
  p.x = x;
  p.x_stride = h;
  p.inputs = pairs.sorted;
  p.input_divisor = int32_t(top_k);
  p.out = base + at.hidden;
  p.out_stride = max_width;
  p.starts = pairs.starts;
  p.num_rows = pairs.count;
  p.num_groups = pairs.num_experts;
  p.groups_per_pool = int32_t(experts_per_pool);
  p.typical_rows = int32_t(std::min<int64_t>(m, ceil_div(m * top_k * 2, experts_per_pool)));
  for (int64_t i = 0; i < num_pools; ++i) p.pools[i] = pools[i].up_gate;
  if (Status status = grouped_linear(stream, p)) return status;

  p.x = p.out;
  p.x_stride = max_width;
  p.inputs = nullptr;
  p.out = base + at.partial;
  p.out_stride = h;
  p.out_is_float = true;
  p.outputs = pairs.sorted;
  for (int64_t i = 0; i < num_pools; ++i) p.pools[i] = pools[i].down;
  if (Status status = grouped_linear(stream, p)) return status;

  return launch({"moe_combine", dim3(unsigned(ceil_div(m * h / 4, kThreads))), kThreads, 0, stream},
                combine_kernel, static_cast<const float*>(p.out), expert_ids, expert_weights,
                static_cast<bf16*>(out), m * h / 4, int(h), int(top_k));
}

}  // namespace octet::gpu

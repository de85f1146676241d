// gpu/route.cu   Which experts a token uses, and with what weight, for both pools at once
//
//   p = softmax(x @ router[pool]^T) in fp32; the k best of p + bias, ties to the lowest index, best first;
//   weights p / max(sum of the chosen p, norm_min)
//
//   x [M, H] bf16   router [P, E, H] fp32, packed (packed_weight.h)   bias [P, E] fp32   token_types [M]
//   expert_ids [M, k] = pool * E + e, expert_weights [M, k]; inert tokens (-1) get -1 and 0
//
//   bytes   4 P E H for the routers + 2 M H   -> a few us; both pools' logits are made for every token, so
//           that no block has to ask for a token's type
//   map     grouped_linear.cuh with the columns cut in router_parts(H) groups, so that the few outputs still
//           keep 64 blocks busy; then a warp per token, two experts per lane
//   needs   H % 8 == 0, E <= 64, k <= 32; M may be 0
//   order   logits as grouped_linear.cuh, their parts ascending; the softmax's sum by the tree of warp_sum,
//           the chosen p ascending j
//   source  ERNIE 4.5's router, see the model's description       twin  cpu/route.cc
//   speed   not yet measured

#include "elements.cuh"
#include "launchers.h"

namespace octet::gpu {
namespace {

constexpr int kThreads = 128;
constexpr int kPerLane = 2;  // experts

struct Selection {
  const float* logits;  // [parts, M, num_pools * num_experts]
  const float* bias;
  const int32_t* token_types;
  float norm_min;
  int32_t* expert_ids;
  float* expert_weights;
  int64_t m;
  int num_pools, num_experts, top_k, parts;

  __device__ float logit(int64_t token, int pool, int expert) const {
    const float* part = logits + (token * num_pools + pool) * num_experts + expert;
    float sum = *part;
    for (int i = 1; i < parts; ++i) sum += part[i * m * num_pools * num_experts];
    return sum;
  }
};

// The larger score wins, of equal ones the lower index; NaN never wins.
struct Candidate {
  float score;
  int expert;
};
__device__ __forceinline__ Candidate better(Candidate a, Candidate b) {
  const bool take_b = b.score > a.score || (b.score == a.score && b.expert < a.expert);
  return take_b ? b : a;
}

__global__ void __launch_bounds__(kThreads) select_experts_kernel(Selection s) {
  const int lane = threadIdx.x % 32;
  const int64_t token = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (token >= s.m) return;
  int32_t* ids = s.expert_ids + token * s.top_k;
  float* weights = s.expert_weights + token * s.top_k;
  const int pool = s.token_types[token];
  if (pool < 0 || pool >= s.num_pools) {
    if (lane < s.top_k) {
      ids[lane] = -1;
      weights[lane] = 0;
    }
    return;
  }
  float p[kPerLane], biased[kPerLane], largest = -INFINITY, sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * 32 + lane;
    p[i] = expert < s.num_experts ? s.logit(token, pool, expert) : -INFINITY;
    largest = fmaxf(largest, p[i]);
  }
  largest = warp_max(largest);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    p[i] = expf(p[i] - largest);
    sum += p[i];
  }
  sum = warp_sum(sum);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * 32 + lane;
    p[i] /= sum;
    biased[i] = expert < s.num_experts ? p[i] + s.bias[pool * s.num_experts + expert] : -INFINITY;
  }

  float chosen = 0, chosen_sum = 0;  // lane j keeps choice j
  int chosen_expert = 0;
  for (int j = 0; j < s.top_k; ++j) {
    Candidate best{-INFINITY, s.num_experts};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) best = better(best, {biased[i], i * 32 + lane});
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      best = better(best, {__shfl_xor_sync(0xffffffffu, best.score, step),
                           __shfl_xor_sync(0xffffffffu, best.expert, step)});
    }
    const int expert = min(best.expert, s.num_experts - 1);  // all scores NaN: the last one, not a wild index
    const float weight = __shfl_sync(0xffffffffu, expert < 32 ? p[0] : p[1], expert % 32);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i * 32 + lane == expert) biased[i] = -INFINITY;
    }
    chosen_sum += weight;
    if (lane == j) {
      chosen = weight;
      chosen_expert = expert;
    }
  }
  if (lane < s.top_k) {
    ids[lane] = pool * s.num_experts + chosen_expert;
    weights[lane] = chosen / fmaxf(chosen_sum, s.norm_min);
  }
}

}  // namespace

// A rule of the width alone, because it is part of the order.
int64_t router_parts(int64_t hidden) {
  return hidden >= 512 && hidden % 64 == 0 ? 8 : 1;
}

Status route_experts(Stream stream, const void* x, const PackedWeight& router, const float* bias,
                     const int32_t* token_types, float norm_min, int32_t* expert_ids, float* expert_weights,
                     int64_t m, int64_t hidden, int64_t num_pools, int64_t num_experts, int64_t top_k,
                     float* logits) {
  if (num_experts > 32 * kPerLane) return "there may be at most 64 experts in a pool";
  if (top_k > 32 || top_k > num_experts) return "top_k may be at most 32 and at most the number of experts";
  const int64_t parts = router_parts(hidden);
  if (router.kind != WeightKind::float32 || router.out_features != num_pools * num_experts ||
      router.in_features * parts != hidden) {
    return "the router must be packed as router_parts(H) fp32 matrices of num_pools * num_experts rows";
  }
  GroupedLinear p = {};
  p.x = x;
  p.x_stride = hidden / parts;
  p.input_divisor = 1;
  p.out = logits;
  p.out_stride = router.out_features;
  p.out_is_float = true;
  p.num_rows = p.typical_rows = int32_t(m);
  p.num_groups = p.groups_per_pool = int32_t(parts);
  p.pools[0] = router;
  if (Status status = grouped_linear(stream, p)) return status;
  if (m == 0) return nullptr;
  const Selection s{logits, bias,           token_types,      norm_min,   expert_ids, expert_weights,
                    m,      int(num_pools), int(num_experts), int(top_k), int(parts)};
  return launch({"select_experts", dim3(unsigned(ceil_div(m, kThreads / 32))), kThreads, 0, stream},
                select_experts_kernel, s);
}

}  // namespace octet::gpu

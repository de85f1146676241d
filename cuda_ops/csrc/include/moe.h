// include/moe.h   Routing to experts, and the experts themselves, for any mixture of pools in one batch.
//
// A CUDA twin is declared beside each function in namespace octet::gpu, with a stream as first argument.

#pragma once

#include "../common/status.h"
#include "weight_view.h"

namespace octet::cpu {

struct RouterShape {
  int64_t num_pools, num_experts, hidden, top_k;  // experts per pool
};

// x [M, H], router [P, E, H] fp32, bias [P, E] fp32, token_types [M] (-1: inert)
// -> expert_ids [M, k] = pool * E + e, expert_weights [M, k]
Status route_experts(DType type, const void* x, const float* router, const float* bias,
                     const int32_t* token_types, float norm_min, int32_t* expert_ids, float* expert_weights,
                     int64_t m, const RouterShape& shape);

// Two stacks of matrices: up_gate [E, 2 * width, H] (gate rows first), down [E, H, width].
struct ExpertPool {
  WeightView up_gate, down;  // views of matrix 0; at(e) is expert e

  int64_t width() const { return down.in_features; }
};

// out[i] = sum over j in routing order of expert_weights[i, j] * expert(expert_ids[i, j])(x[i]), +
// shared(x[i]) pools [num_pools], and behind them the shared expert, a pool of one, where has_shared
Status moe_experts(DType type, const void* x, const int32_t* expert_ids, const float* expert_weights,
                   const ExpertPool* pools, int64_t num_pools, int64_t experts_per_pool, bool has_shared,
                   void* out, int64_t m, int64_t h, int64_t top_k);

}  // namespace octet::cpu

// cpu/route.cc   Which experts a token uses, and how much of each.
//
//   p = softmax(x . router[pool])    chosen = top k of p + bias    weight = p[chosen] / max(sum, norm_min)
//
//   x [M, H] fp32|bf16   router [P, E, H] fp32   bias [P, E]   ids, weights [M, k]
//
//   flops   2 * M * E * H in fp32, whatever T is: bf16 routers flip choices
//   map     (pool, a few rows) over threads; a row uses its own pool alone
//   needs   k <= E; token types in [-1, P); M may be 0
//   order   products as in dot_panel.h; equal scores go to the lowest index; an inert row gets id -1

#include <algorithm>

#include "../include/moe.h"
#include "dot_panel.h"
#include "rows.h"

namespace octet::cpu {
namespace {

constexpr int64_t kRowsPerTask = 24;

// scores[e] becomes softmax(scores)[e].
void softmax(float* scores, int64_t size) {
  float highest = scores[0];
  for (int64_t e = 1; e < size; ++e) highest = std::max(highest, scores[e]);
  F32x16 total = zeros();
  by_sixteen(size, [&](int64_t e, int64_t n) {
    store_upto(scores + e, exp(load_upto(scores + e, n) - broadcast(highest)), n);
    total = total + load_upto(scores + e, n);
  });
  const F32x16 all = broadcast(sum(total));
  by_sixteen(size, [&](int64_t e, int64_t n) { store_upto(scores + e, load_upto(scores + e, n) / all, n); });
}

// The index of the highest unchosen score, the lowest index where several are equal.
int64_t best_unchosen(const float* p, const float* bias, int64_t num_experts, const int32_t* chosen,
                      int64_t num_chosen) {
  int64_t best = -1;
  for (int64_t e = 0; e < num_experts; ++e) {
    if (std::find(chosen, chosen + num_chosen, int32_t(e)) != chosen + num_chosen) continue;
    if (best < 0 || p[e] + bias[e] > p[best] + bias[best]) best = e;
  }
  return best;
}

void choose(const float* p, const float* bias, float norm_min, int64_t first_id, const RouterShape& shape,
            int32_t* ids, float* weights) {
  float total = 0.0f;
  for (int64_t j = 0; j < shape.top_k; ++j) {
    ids[j] = int32_t(best_unchosen(p, bias, shape.num_experts, ids, j));
    weights[j] = p[ids[j]];
    total += weights[j];
  }
  for (int64_t j = 0; j < shape.top_k; ++j) {
    ids[j] += int32_t(first_id);
    weights[j] /= std::max(total, norm_min);
  }
}

}  // namespace

Status route_experts(DType type, const void* x, const float* router, const float* bias,
                     const int32_t* token_types, float norm_min, int32_t* expert_ids, float* expert_weights,
                     int64_t m, const RouterShape& shape) {
  for (int64_t i = 0; i < m; ++i) {
    if (token_types[i] < -1 || token_types[i] >= shape.num_pools) return "token_types must lie in [-1, P)";
  }
  const int64_t h = shape.hidden, k = shape.top_k;
  std::fill(expert_ids, expert_ids + m * k, -1);
  std::fill(expert_weights, expert_weights + m * k, 0.0f);
  for (int64_t begin = 0; begin < m; begin += kRowBlock) {
    const int64_t num_rows = std::min(kRowBlock, m - begin);
    const void* block = as_type(type, row_of(type, x, begin, h), DType::float32, num_rows, h);
    const int64_t tasks = ceil_div(num_rows, kRowsPerTask);
    parallel_for(tasks * shape.num_pools, [&](int64_t task) {
      const int64_t pool = task / tasks, first = task % tasks * kRowsPerTask;
      const void* rows[kRowsPerTask];
      int64_t members[kRowsPerTask], count = 0;
      for (int64_t i = first; i < std::min(first + kRowsPerTask, num_rows); ++i) {
        if (token_types[begin + i] != pool) continue;
        rows[count] = row_of(DType::float32, block, i, h);
        members[count++] = begin + i;
      }
      const WeightView w{
          WeightKind::float32, router + pool * shape.num_experts * h, nullptr, 0, shape.num_experts, h};
      float* scores = scratch<float>(Slot::scores, size_t(kRowsPerTask * shape.num_experts));
      dot_panel(DType::float32, rows, count, w, 0, shape.num_experts, scores, shape.num_experts);
      for (int64_t i = 0; i < count; ++i) {
        float* p = scores + i * shape.num_experts;
        softmax(p, shape.num_experts);
        choose(p, bias + pool * shape.num_experts, norm_min, pool * shape.num_experts, shape,
               expert_ids + members[i] * k, expert_weights + members[i] * k);
      }
    });
  }
  return nullptr;
}

}  // namespace octet::cpu

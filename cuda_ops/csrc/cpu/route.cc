// cpu/route.cc   Which experts a token uses, and how much of each.
//
//   p = softmax(x . router[pool])    chosen = top k of p + bias    weight = p[chosen] / max(sum, norm_min)
//
//   x [M, H] fp32|bf16   router [P, E, H] fp32   bias [P, E]   ids, weights [M, k]
//
//   flops   2 * M * E * H in fp32, whatever T is: bf16 routers flip choices
//   map     (pool, a few rows) over threads, and where these are fewer than threads slices of the experts,
//           too; a row uses its own pool alone
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

// Some rows of a block, and those among them that use `pool`.
struct Members {
  const void* rows[kRowsPerTask];
  int64_t index[kRowsPerTask];  // in the block
  int64_t count = 0;
};

// The routing of up to kRowBlock rows. A part is a pool and kRowsPerTask rows.
struct Block {
  const void* x;  // [num_rows, H] fp32
  const int32_t* token_types;
  int64_t num_rows;
  const float* router;
  const RouterShape& shape;
  float* scores;  // [parts, kRowsPerTask, E]

  int64_t parts() const { return ceil_div(num_rows, kRowsPerTask) * shape.num_pools; }
  int64_t pool(int64_t part) const { return part % shape.num_pools; }
  float* scores_of(int64_t part) const { return scores + part * kRowsPerTask * shape.num_experts; }

  Members members(int64_t part) const {
    Members found;
    const int64_t first = part / shape.num_pools * kRowsPerTask;
    for (int64_t i = first; i < std::min(first + kRowsPerTask, num_rows); ++i) {
      if (token_types[i] != pool(part)) continue;
      found.rows[found.count] = row_of(DType::float32, x, i, shape.hidden);
      found.index[found.count++] = i;
    }
    return found;
  }

  // One of `num_slices` slices of the experts: few rows are many threads' work, too.
  void multiply(int64_t part, int64_t slice, int64_t num_slices) const {
    const int64_t num_experts = shape.num_experts, h = shape.hidden;
    const int64_t begin = slice * num_experts / num_slices, end = (slice + 1) * num_experts / num_slices;
    const Members rows = members(part);
    const WeightView w{
        WeightKind::float32, router + pool(part) * num_experts * h, nullptr, 0, num_experts, h};
    dot_panel(DType::float32, rows.rows, rows.count, w, begin, end - begin, scores_of(part) + begin,
              num_experts);
  }
};

}  // namespace

Status route_experts(DType type, const void* x, const float* router, const float* bias,
                     const int32_t* token_types, float norm_min, int32_t* expert_ids, float* expert_weights,
                     int64_t m, const RouterShape& shape) {
  for (int64_t i = 0; i < m; ++i) {
    if (token_types[i] < -1 || token_types[i] >= shape.num_pools) return "token_types must lie in [-1, P)";
  }
  const int64_t h = shape.hidden, k = shape.top_k, num_experts = shape.num_experts;
  std::fill(expert_ids, expert_ids + m * k, -1);
  std::fill(expert_weights, expert_weights + m * k, 0.0f);
  for (int64_t begin = 0; begin < m; begin += kRowBlock) {
    const int64_t num_rows = std::min(kRowBlock, m - begin);
    Block block{as_type(type, row_of(type, x, begin, h), DType::float32, num_rows, h),
                token_types + begin,
                num_rows,
                router,
                shape,
                nullptr};
    const int64_t parts = block.parts();
    block.scores = scratch<float>(Slot::scores, size_t(parts * kRowsPerTask * num_experts));
    const int64_t num_slices =
        std::clamp<int64_t>(num_threads() * shape.num_pools / parts, 1, ceil_div(num_experts, 16));
    parallel_for(parts * num_slices,
                 [&](int64_t i) { block.multiply(i / num_slices, i % num_slices, num_slices); });
    parallel_for(parts, [&](int64_t part) {
      const Members rows = block.members(part);
      for (int64_t i = 0; i < rows.count; ++i) {
        float* p = block.scores_of(part) + i * num_experts;
        softmax(p, num_experts);
        const int64_t row = begin + rows.index[i], pool = block.pool(part);
        choose(p, bias + pool * num_experts, norm_min, pool * num_experts, shape, expert_ids + row * k,
               expert_weights + row * k);
      }
    });
  }
  return nullptr;
}

}  // namespace octet::cpu

// cpu/moe.cc   out[i] = sum_j weight[i, j] * down(silu(gate(x[i])) * up(x[i])) of expert id[i, j], + the
// shared one's
//
//   x, out [M, H]   up_gate [E, 2 * width, H]   down [E, H, width]   per pool; widths may differ
//
//   bytes   each used expert once per kRowBlock of its rows   -> memory bound up to some tokens per expert
//   flops   6 * M * k * H * width
//   map     (token, slot) pairs sorted by expert; a task is one panel of weight rows for all rows of an
//           expert, read through row pointers, so activations are never gathered. Where memory is the bound a
//           thread takes runs of them, each as one stream of gate rows and one of up rows (two cores of an
//           EPYC, Zen 4, 2026-11-30, one token: 52 GB/s of 56; 46 in streams of 64 rows by turns)
//   needs   ids -1 or in [0, pools * E); M may be 0
//   order   products as in dot_panel.h; the middle activation is rounded to T once (a matrix unit takes it
//           so); the sum over j runs in routing order, the shared expert last, in fp32 and is rounded once
//   source  Shazeer et al. 2017, arXiv:1701.06538; Gale et al. 2022, arXiv:2211.15841

#include "../include/moe.h"

#include <algorithm>
#include <vector>

#include "row_form.h"

namespace octet::cpu {
namespace {

constexpr int64_t kProductFloats = int64_t(16) << 20;  // 64 MiB of expert outputs before they are summed

constexpr int64_t kMemoryBoundRows = 8;  // up to here a panel waits for its bytes (int8_dot.cc)

// Tasks side by side that a thread takes at once where arithmetic is the bound: it fetches the panels of the
// next one while it multiplies.
constexpr int64_t kMostNeighbours = 8;

// What a call has beside its tokens.
struct Experts {
  const ExpertPool* pools;  // the shared expert behind the last
  int64_t num_pools, per_pool;
  bool has_shared;
  int64_t top_k;

  int64_t slots() const { return top_k + has_shared; }  // of a token
  int64_t routed() const { return num_pools * per_pool; }
  int64_t count() const { return routed() + has_shared; }
  int64_t pool_of(int64_t expert) const { return expert / per_pool; }
  WeightView up_gate(int64_t expert) const { return pools[pool_of(expert)].up_gate.at(expert % per_pool); }
  WeightView down(int64_t expert) const { return pools[pool_of(expert)].down.at(expert % per_pool); }
};

// Some pairs of one expert, and one panel of weight rows.
struct Task {
  int64_t expert;
  int64_t first_pair, num_pairs;  // of the sorted pairs
  int64_t first_row, num_rows;    // of the weight
};

// (token, slot) pairs in the order of their expert, then of their index.
struct SortedPairs {
  std::vector<int64_t> starts;  // [experts + 1] into `pairs`
  std::vector<int64_t> pairs;   // token * slots + slot
  std::vector<int64_t> place;   // [M * slots] where a pair went; -1 for an inert one

  // ids [M, top_k]
  SortedPairs(const int32_t* ids, int64_t num_tokens, const Experts& experts)
      : starts(size_t(experts.count() + 1)), place(size_t(num_tokens * experts.slots()), -1) {
    const int64_t slots = experts.slots(), top_k = experts.top_k;
    const auto expert_of = [&](size_t pair) {
      const int64_t token = int64_t(pair) / slots, slot = int64_t(pair) % slots;
      return slot < top_k ? ids[token * top_k + slot] : int32_t(experts.routed());
    };
    for (size_t i = 0; i < place.size(); ++i) {
      if (expert_of(i) >= 0) ++starts[size_t(expert_of(i)) + 1];
    }
    for (size_t e = 0; e + 1 < starts.size(); ++e) starts[e + 1] += starts[e];
    pairs.resize(size_t(starts.back()));
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (size_t i = 0; i < place.size(); ++i) {
      if (expert_of(i) < 0) continue;
      place[i] = next[size_t(expert_of(i))]++;
      pairs[size_t(place[i])] = int64_t(i);
    }
  }

  // Of one of the first `num_experts`.
  int64_t largest(int64_t num_experts) const {
    int64_t most = 0;
    for (size_t e = 0; e < size_t(num_experts); ++e) most = std::max(most, starts[e + 1] - starts[e]);
    return most;
  }
};

// The experts' work on one block of tokens.
class Block {
 public:
  Block(DType type, const Experts& experts, int64_t h, const void* x, const int32_t* ids, int64_t num_tokens)
      : type_(type), experts_(experts), h_(h), x_(x), sorted_(ids, num_tokens, experts) {
    for (int64_t p = 0; p < experts.num_pools + experts.has_shared; ++p) {
      x_forms_.emplace_back(type, experts.pools[p].up_gate);
      hidden_forms_.emplace_back(type, experts.pools[p].down);
      hidden_stride_ = std::max(hidden_stride_, hidden_forms_.back().row_bytes());
    }
    convert_rows(num_tokens);
    hidden_ = scratch<char>(Slot::hidden, sorted_.pairs.size() * size_t(hidden_stride_));
    products_ = scratch<float>(Slot::experts, sorted_.pairs.size() * size_t(h));
  }

  void compute() {
    run(tasks([this](int64_t pool) { return hidden_width(size_t(pool)); },
              [this](int64_t pool) { return experts_.pools[pool].width(); }),
        [this](const Task& task) { up_gate(task); });
    run(tasks([this](int64_t pool) { return hidden_forms_[size_t(pool)].panel_width(h_); },
              [this](int64_t) { return h_; }),
        [this](const Task& task) { down(task); });
  }

  // out[token] = the weighted sum of its products, in routing order.
  template <class T>
  void combine(int64_t token, const float* weights, T* out) const {
    by_sixteen(h_, [&](int64_t c, int64_t n) {
      F32x16 total = zeros();
      for (int64_t j = 0; j < experts_.slots(); ++j) {
        const int64_t place = sorted_.place[size_t(token * experts_.slots() + j)];
        if (place < 0) continue;
        const F32x16 weight = broadcast(j < experts_.top_k ? weights[j] : 1.0f);
        total = fma(weight, load_upto(products_ + place * h_ + c, n), total);
      }
      store_upto(out + c, total, n);
    });
  }

 private:
  // Tasks of few rows take as long as their weights take to arrive, all the same; others differ. The shared
  // expert has all tokens, but it comes last, where runs are short.
  template <class Body>
  void run(const std::vector<Task>& tasks, Body body) const {
    const int64_t count = int64_t(tasks.size());
    if (sorted_.largest(experts_.routed()) > kMemoryBoundRows) {
      const int64_t size = std::clamp<int64_t>(count / (8 * num_threads()), 1, kMostNeighbours);
      return parallel_for(ceil_div(count, size), [&](int64_t group) {
        const int64_t end = std::min(count, (group + 1) * size);
        for (int64_t i = group * size; i < end; ++i) body(tasks[size_t(i)]);
      });
    }
    parallel_in_runs(count, [&](int64_t begin, int64_t end) {
      while (begin < end) body(join_neighbours(tasks, begin, end));
    });
  }

  // The first task of a run together with those that go on where it ends; `begin` moves behind them.
  static Task join_neighbours(const std::vector<Task>& tasks, int64_t& begin, int64_t end) {
    Task all = tasks[size_t(begin++)];
    for (; begin < end && tasks[size_t(begin)].first_pair == all.first_pair; ++begin) {
      all.num_rows += tasks[size_t(begin)].num_rows;
    }
    return all;
  }

  template <class Width, class Rows>
  std::vector<Task> tasks(Width width_of, Rows rows_of) const {
    std::vector<Task> all;
    for (size_t e = 0; e + 1 < sorted_.starts.size(); ++e) {
      if (sorted_.starts[e] == sorted_.starts[e + 1]) continue;
      const int64_t pool = experts_.pool_of(int64_t(e)), width = width_of(pool), rows = rows_of(pool);
      for (int64_t first = sorted_.starts[e]; first < sorted_.starts[e + 1]; first += kRowBlock) {
        const int64_t pairs = std::min(kRowBlock, sorted_.starts[e + 1] - first);
        for (int64_t row = 0; row < rows; row += width) {
          all.push_back({int64_t(e), first, pairs, row, std::min(width, rows - row)});
        }
      }
    }
    return all;
  }

  // Columns of a task that makes whole spans of hidden rows.
  int64_t hidden_width(size_t pool) const {
    const int64_t unit = hidden_forms_[pool].column_unit();
    return ceil_div(x_forms_[pool].panel_width(experts_.pools[pool].width()), unit) * unit;
  }

  // x in the form of each pool, once for pools that share a form.
  void convert_rows(int64_t num_tokens) {
    std::vector<size_t> twins, starts;  // of each pool: the first pool of its form, its place in the scratch
    size_t size = 0;
    for (const RowForm& form : x_forms_) {
      size_t twin = 0;
      while (!x_forms_[twin].is_same_as(form)) ++twin;
      twins.push_back(twin);
      starts.push_back(size);
      if (twin + 1 == twins.size() && !form.is_plain()) size += size_t(num_tokens * form.row_bytes());
    }
    char* memory = scratch<char>(Slot::activations, size);
    for (size_t p = 0; p < x_forms_.size(); ++p) {
      if (x_forms_[p].is_plain()) {
        x_rows_.push_back(static_cast<const char*>(x_));
      } else {
        if (twins[p] == p) x_forms_[p].convert(x_, num_tokens, memory + starts[p]);
        x_rows_.push_back(memory + starts[twins[p]]);
      }
    }
  }

  // hidden = silu(gate) * up for the task's columns; gate rows come first, up rows `width` later.
  void up_gate(const Task& task) {
    const size_t pool = size_t(experts_.pool_of(task.expert));
    const WeightView w = experts_.up_gate(task.expert);
    const void* rows[kRowBlock];
    for (int64_t i = 0; i < task.num_pairs; ++i) {
      const int64_t token = sorted_.pairs[size_t(task.first_pair + i)] / experts_.slots();
      rows[i] = x_rows_[pool] + token * x_forms_[pool].row_bytes();
    }
    float* gate = scratch<float>(Slot::outputs, size_t(2 * task.num_pairs * task.num_rows));
    float* up = gate + task.num_pairs * task.num_rows;
    const int64_t width = experts_.pools[pool].width();
    x_forms_[pool].multiply(rows, task.num_pairs, w, task.first_row, task.num_rows, gate, task.num_rows);
    x_forms_[pool].multiply(rows, task.num_pairs, w, width + task.first_row, task.num_rows, up,
                            task.num_rows);
    for (int64_t i = 0; i < task.num_pairs; ++i) {
      store_hidden(task, i, gate + i * task.num_rows, up + i * task.num_rows);
    }
  }

  // silu(gate) * up rounded to T, then in the form that down multiplies. Overwrites `gate`.
  void store_hidden(const Task& task, int64_t i, float* gate, const float* up) {
    const RowForm& form = hidden_forms_[size_t(experts_.pool_of(task.expert))];
    char* row = hidden_row(task, i);
    by_sixteen(task.num_rows, [&](int64_t c, int64_t n) {
      F32x16 value = silu(load_upto(gate + c, n)) * load_upto(up + c, n);
      if (type_ == DType::bfloat16) {
        BF16 rounded[16];
        store(rounded, value);
        value = load(rounded);
      }
      if (form.is_int8()) {
        store_upto(gate + c, value, n);
      } else if (form.is_bfloat16()) {
        store_upto(reinterpret_cast<BF16*>(row) + task.first_row + c, value, n);
      } else {
        store_upto(reinterpret_cast<float*>(row) + task.first_row + c, value, n);
      }
    });
    if (form.is_int8()) quantise_columns(form.layout(), gate, task.first_row, task.num_rows, row);
  }

  void down(const Task& task) {
    const size_t pool = size_t(experts_.pool_of(task.expert));
    const WeightView w = experts_.down(task.expert);
    const void* rows[kRowBlock];
    for (int64_t i = 0; i < task.num_pairs; ++i) rows[i] = hidden_row(task, i);
    hidden_forms_[pool].multiply(rows, task.num_pairs, w, task.first_row, task.num_rows,
                                 products_ + task.first_pair * h_ + task.first_row, h_);
  }

  char* hidden_row(const Task& task, int64_t i) const {
    return hidden_ + (task.first_pair + i) * hidden_stride_;
  }

  const DType type_;
  const Experts& experts_;
  const int64_t h_;
  const void* x_;
  const SortedPairs sorted_;
  std::vector<RowForm> x_forms_, hidden_forms_;  // [pools]
  std::vector<const char*> x_rows_;              // [pools] x in the pool's form
  int64_t hidden_stride_ = 0;                    // bytes
  char* hidden_;                                 // [pairs, hidden_stride_] in the form of down
  float* products_;                              // [pairs, H]
};

}  // namespace

Status moe_experts(DType type, const void* x, const int32_t* expert_ids, const float* expert_weights,
                   const ExpertPool* pools, int64_t num_pools, int64_t experts_per_pool, bool has_shared,
                   void* out, int64_t m, int64_t h, int64_t top_k) {
  const Experts experts{pools, num_pools, experts_per_pool, has_shared, top_k};
  for (int64_t i = 0; i < m * top_k; ++i) {
    if (expert_ids[i] < -1 || expert_ids[i] >= experts.routed()) {
      return "expert_ids must be -1 or name an expert of the pools";
    }
  }
  for (int64_t p = 0; p < num_pools + has_shared; ++p) {
    const bool is_packed = pools[p].up_gate.is_packed || pools[p].down.is_packed;
    if (is_packed && type != DType::bfloat16) return kPackedTakesBfloat16;
  }
  const int64_t most = std::max<int64_t>(16, kProductFloats / std::max<int64_t>(1, experts.slots() * h));
  for (int64_t begin = 0; begin < m; begin += most) {
    const int64_t num_tokens = std::min(most, m - begin);
    Block block(type, experts, h, row_of(type, x, begin, h), expert_ids + begin * top_k, num_tokens);
    block.compute();
    with_type(type, [&](auto t) {
      using T = decltype(t);
      parallel_for(num_tokens, [&](int64_t i) {
        block.combine(i, expert_weights + (begin + i) * top_k, (T*)out + (begin + i) * h);
      });
    });
  }
  return nullptr;
}

}  // namespace octet::cpu

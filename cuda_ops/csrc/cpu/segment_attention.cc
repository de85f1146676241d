// cpu/segment_attention.cc   softmax(q k^T * scale) v, every patch seeing all patches of its own segment.
//
//   qkv [P, 3, heads, head_dim]   segment_starts [N + 1]   out [P, heads * head_dim]
//
//   flops   4 * sum(length^2) * heads * head_dim   -> arithmetic bound
//   memory  kQueryRows x kKvSegment scores per thread, whatever the length (24,708 patches in one picture)
//   map     (segment, head, kQueryRows queries) over threads
//   needs   segments ascending and covering P; head_dim of any size
//   order   KV segments of kKvSegment inside each segment, merged ascending (flash.h)
//   source  Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135

#include <vector>

#include "../common/thread_pool.h"
#include "flash.h"

namespace octet::cpu {
namespace {

struct Task {
  int64_t begin, end;  // rows of the segment
  int64_t first_query;
};

std::vector<Task> cut_into_tasks(const int32_t* starts, int64_t num_segments) {
  std::vector<Task> tasks;
  for (int64_t s = 0; s < num_segments; ++s) {
    for (int64_t q = starts[s]; q < starts[s + 1]; q += kQueryRows)
      tasks.push_back({starts[s], starts[s + 1], q});
  }
  return tasks;
}

template <class T>
void attend(const T* qkv, const Task& task, int64_t head, float scale, T* out, int64_t heads, int64_t hd) {
  const int64_t row = 3 * heads * hd, rows = std::min(kQueryRows, task.end - task.first_query);
  float* q = scratch<float>(Slot::activations, size_t(rows * hd));
  float* memory = scratch<float>(Slot::accumulators, size_t(2 * Partial::size(rows, hd)));
  const Partial all = Partial::in(memory, rows);
  const Partial one = Partial::in(memory + Partial::size(rows, hd), rows);
  int64_t limits[kQueryRows];
  for (int64_t r = 0; r < rows; ++r) {
    load_query(qkv + (task.first_query + r) * row + head * hd, hd, q + r * num_words<T>(hd));
    limits[r] = task.end - task.begin;
  }
  all.clear(rows, hd);
  const auto fill = [&](int64_t first, int64_t n, KvRows<T>& kv) {
    for (int64_t i = 0; i < n; ++i) {
      kv.k[i] = qkv + (task.begin + first + i) * row + (heads + head) * hd;
      kv.v[i] = kv.k[i] + heads * hd;
    }
  };
  for (int64_t first = 0; first < task.end - task.begin; first += kKvSegment) {
    const int64_t n = std::min(kKvSegment, task.end - task.begin - first);
    attend_segment<T, T>({q, limits, rows, hd, scale}, first, n, fill, one);
    merge(all, one, rows, hd);
  }
  for (int64_t r = 0; r < rows; ++r) {
    finish_row(all, r, hd, out + (task.first_query + r) * heads * hd + head * hd);
  }
}

}  // namespace

Status segment_attention(DType type, const void* qkv, const int32_t* segment_starts, int64_t num_segments,
                         float scale, void* out, int64_t p, int64_t heads, int64_t head_dim) {
  if (head_dim % 2 != 0) return kOddHeads;
  if (segment_starts[0] != 0 || segment_starts[num_segments] != p) {
    return "segment_starts must begin with 0 and end with P";
  }
  for (int64_t s = 0; s < num_segments; ++s) {
    if (segment_starts[s] > segment_starts[s + 1]) return "segment_starts must ascend";
  }
  const std::vector<Task> tasks = cut_into_tasks(segment_starts, num_segments);
  with_type(type, [&](auto t) {
    using T = decltype(t);
    parallel_for(int64_t(tasks.size()) * heads, [&](int64_t i) {
      attend((const T*)qkv, tasks[size_t(i / heads)], i % heads, scale, (T*)out, heads, head_dim);
    });
  });
  return nullptr;
}

}  // namespace octet::cpu

// cpu/paged_attention.cc   Causal softmax(q k^T * scale) v over KV blocks; decode and chunked prefill alike.
//
//   q [M, nq, hd]   k_cache, v_cache [num_blocks, nkv, block_size, hd] of q's type, or int8 with scales
//   [num_blocks, nkv, block_size]   out [M, nq * hd]
//
//   bytes   2 * kv_len * nkv * hd * sizeof(cache) per sequence and query tile   -> memory bound in decode
//   flops   4 * sum(positions seen) * nq * hd                               -> arithmetic bound in prefill
//   map     a tile holds the heads that share one KV head, for as many queries as fit kQueryRows; tiles over
//           threads, and where there are fewer tiles than threads their KV segments over threads too
//   needs   nq a multiple of nkv; block ids inside the cache; M may be 0; unused slots may hold NaN
//   order   KV segments of kKvSegment positions from the sequence's start, merged ascending (flash.h)
//   source  Kwon et al. 2023, arXiv:2309.06180; Dao et al. 2023, "Flash-Decoding"

#include <vector>

#include "../common/thread_pool.h"
#include "flash.h"

namespace octet::cpu {
namespace {

// Some consecutive queries of one sequence under one KV head.
struct Task {
  int64_t sequence, kv_head;
  int64_t first_query, num_queries;  // rows of q
  int64_t first_position;            // of the first query

  int64_t positions() const { return first_position + num_queries; }
  int64_t segments() const { return ceil_div(positions(), kKvSegment); }
};

std::vector<Task> cut_into_tasks(const PagedBatch& batch, int64_t group, int64_t num_kv_heads) {
  const int64_t per_tile = std::max<int64_t>(1, kQueryRows / group);
  std::vector<Task> tasks;
  for (int64_t s = 0; s < batch.num_sequences; ++s) {
    const int64_t begin = batch.query_starts[s], end = batch.query_starts[s + 1];
    const int64_t before = batch.kv_lens[s] - (end - begin);
    for (int64_t head = 0; head < num_kv_heads; ++head) {
      for (int64_t q = begin; q < end; q += per_tile) {
        tasks.push_back({s, head, q, std::min(per_tile, end - q), before + q - begin});
      }
    }
  }
  return tasks;
}

template <class T, class C>
struct Attention {
  const T* q;
  const KvCache& cache;
  T* out;
  const PagedBatch& batch;
  const KvShape& kv;
  int64_t num_heads;
  float scale;

  int64_t group() const { return num_heads / kv.num_kv_heads; }
  int64_t rows(const Task& task) const { return task.num_queries * group(); }

  const T* query(const Task& task, int64_t r) const {
    const int64_t head = task.kv_head * group() + r % group();
    return q + ((task.first_query + r / group()) * num_heads + head) * kv.head_dim;
  }
  T* output(const Task& task, int64_t r) const { return out + (query(task, r) - q); }

  void attend(const Task& task, int64_t segment, Partial result) const {
    const int64_t hd = kv.head_dim, n = rows(task);
    float* queries = scratch<float>(Slot::activations, size_t(n * hd));
    int64_t* limits = scratch<int64_t>(Slot::row_pointers, size_t(n));
    for (int64_t r = 0; r < n; ++r) {
      load_query(query(task, r), hd, queries + r * num_words<T>(hd));
      limits[r] = task.first_position + r / group() + 1;
    }
    const int64_t first = segment * kKvSegment;
    const auto fill = [&](int64_t position, int64_t count, KvRows<C>& rows) {
      const int32_t* table = batch.block_tables + task.sequence * batch.max_blocks;
      for (int64_t i = 0; i < count;) {
        const int64_t offset = (position + i) % kv.block_size;
        const int64_t block = table[(position + i) / kv.block_size];
        int64_t place = (block * kv.num_kv_heads + task.kv_head) * kv.block_size + offset;
        for (const int64_t end = std::min(count, i + kv.block_size - offset); i < end; ++i, ++place) {
          rows.k[i] = static_cast<const C*>(cache.k) + place * hd;
          rows.v[i] = static_cast<const C*>(cache.v) + place * hd;
          if constexpr (std::is_same_v<C, int8_t>) {
            rows.k_scales[i] = to_float(cache.k_scales[place]);
            rows.v_scales[i] = to_float(cache.v_scales[place]);
          }
        }
      }
    };
    attend_segment<T, C>({queries, limits, n, hd, scale}, first,
                         std::min(kKvSegment, task.positions() - first), fill, result);
  }

  void finish(const Task& task, Partial all) const {
    for (int64_t r = 0; r < rows(task); ++r) finish_row(all, r, kv.head_dim, output(task, r));
  }

  void run_whole(const Task& task) const {
    const int64_t n = rows(task), size = Partial::size(n, kv.head_dim);
    float* memory = scratch<float>(Slot::accumulators, size_t(2 * size));
    const Partial all = Partial::in(memory, n), one = Partial::in(memory + size, n);
    all.clear(n, kv.head_dim);
    for (int64_t segment = 0; segment < task.segments(); ++segment) {
      attend(task, segment, one);
      merge(all, one, n, kv.head_dim);
    }
    finish(task, all);
  }

  // Segments in parallel, kept apart until all are there, then merged in the order run_whole merges them.
  void run_split(const Task& task) const {
    const int64_t n = rows(task), size = Partial::size(n, kv.head_dim);
    float* memory = scratch<float>(Slot::partials, size_t((task.segments() + 1) * size));
    const auto partial = [&](int64_t i) { return Partial::in(memory + i * size, n); };
    parallel_for(task.segments(), [&](int64_t segment) { attend(task, segment, partial(segment + 1)); });
    partial(0).clear(n, kv.head_dim);
    for (int64_t i = 1; i <= task.segments(); ++i) merge(partial(0), partial(i), n, kv.head_dim);
    finish(task, partial(0));
  }
};

Status check_batch(const PagedBatch& batch, int64_t m, const KvShape& kv) {
  if (batch.query_starts[0] != 0 || batch.query_starts[batch.num_sequences] != m) {
    return "query_starts must begin with 0 and end with M";
  }
  for (int64_t s = 0; s < batch.num_sequences; ++s) {
    const int64_t queries = batch.query_starts[s + 1] - batch.query_starts[s];
    if (queries < 0) return "query_starts must ascend";
    if (queries > batch.kv_lens[s]) return "kv_lens must include the queries of this step";
    if (queries == 0) continue;
    const int64_t used = ceil_div(batch.kv_lens[s], kv.block_size);
    if (used > batch.max_blocks) return "block_tables has too few columns for kv_lens";
    for (int64_t i = 0; i < used; ++i) {
      const int32_t block = batch.block_tables[s * batch.max_blocks + i];
      if (block < 0 || block >= kv.num_blocks) return "block_tables names a block outside the KV cache";
    }
  }
  return nullptr;
}

}  // namespace

Status paged_attention(DType type, const void* q, const KvCache& cache, const PagedBatch& batch, float scale,
                       void* out, int64_t m, int64_t num_heads, const KvShape& kv) {
  if (Status wrong = check_batch(batch, m, kv)) return wrong;
  if (kv.head_dim % 2 != 0) return kOddHeads;
  const std::vector<Task> tasks = cut_into_tasks(batch, num_heads / kv.num_kv_heads, kv.num_kv_heads);
  const auto run = [&](auto t, auto c) {
    using T = decltype(t);
    const Attention<T, decltype(c)> attention{(const T*)q, cache, (T*)out, batch, kv, num_heads, scale};
    if (int64_t(tasks.size()) < num_threads()) {
      for (const Task& task : tasks) attention.run_split(task);
    } else {
      parallel_for(int64_t(tasks.size()), [&](int64_t i) { attention.run_whole(tasks[size_t(i)]); });
    }
  };
  with_type(type, [&](auto t) { cache.k_scales ? run(t, int8_t{}) : run(t, t); });
  return nullptr;
}

}  // namespace octet::cpu

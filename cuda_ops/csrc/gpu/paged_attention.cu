// gpu/paged_attention.cu   Causal attention over the paged KV cache, decode and prefill in one family
//
//   out[i, h, :] = softmax(scale q[i, h, :] K^T) V over the first kv_len - num_queries + i + 1 keys of the
//   query's sequence; query head h uses KV head h / (num_heads / num_kv_heads)
//
//   q [M, num_heads, head_dim] bf16   caches [num_blocks, num_kv_heads, block_size, head_dim] bf16, or int8
//   with scales [num_blocks, num_kv_heads, block_size] bf16   out [M, num_heads * head_dim] bf16
//
//   bytes   2 * 2 head_dim per key, KV head and sequence (int8: 2 * (head_dim + 2)): each key read once in
//           decode, once per 128 rows in prefill   -> decode bandwidth bound, prefill tensor cores
//   map     attention_plan.cuh. Decode: a warp per 256 keys streams tiles of 64 through a ring of two
//           stages of its own, which runs on into its next task; the query heads of a KV head are the rows of
//           one mma. Prefill: a block of 8 warps x 16 rows shares the tiles. Then partial results are merged,
//           where there is more than one.
//   needs   head_dim 32, 64 or 128, block_size a power of two (int8: at least 8), at most 16 query heads per
//           KV head, caches and scales 16-byte aligned, sm_80;
//           lists large enough for the batch (AttentionLimits). Slots past kv_len may hold NaN; sequences
//           may be empty; rows of no sequence and of sequences without keys become zeros.
//   order   attention.cuh inside a segment, attention_plan.cuh above it: depends on the row and its keys
//   alone source  Dao 2023, arXiv:2307.08691 (running softmax); Dao et al. 2023, Flash-Decoding (cut along
//   keys);
//           Kwon et al. 2023, arXiv:2309.06180 (paged KV)         twin  cpu/paged_attention.cc
//   speed   not yet measured

#include <algorithm>

#include "attention_int8.cuh"
#include "attention_merge.cuh"
#include "attention_plan.cuh"

namespace octet::gpu {
namespace {

constexpr int kPrefillThreads = kLongRows * 2;
constexpr int kStages = 2;

// ---- keys and values into shared memory ----

// Where the key at a position lies: its row in the cache, counted in head_dim elements.
__device__ __forceinline__ int64_t cache_row(const AttentionShape& s, int sequence, int kv_head,
                                             int position) {
  const int64_t block = s.block_tables[int64_t(sequence) * s.max_blocks + (position >> s.block_shift)];
  const int offset = position & ((1 << s.block_shift) - 1);
  return ((block * s.num_kv_heads + kv_head) << s.block_shift) + offset;
}

// The caches of one layer; scales are null unless the elements are int8.
template <class Element>
struct Caches {
  const Element *k, *v;
  const bf16 *k_scales, *v_scales;  // [num_blocks, num_kv_heads, block_size]
};

template <int head_dim, class Element>
struct TileOf {
  using Type = PlainTile<head_dim>;
};
template <int head_dim>
struct TileOf<head_dim, int8_t> {
  using Type = Int8Tile<head_dim>;
};

// Starts copying keys [first, first + 64) and their values, zeros from `end` on, with `threads` threads.
template <int head_dim, int threads>
__device__ __forceinline__ void load_tile(const AttentionShape& s, const Caches<bf16>& caches, int sequence,
                                          int kv_head, int first, int end, unsigned char* stage) {
  using Layout = TileLayout<head_dim>;
  const int thread = threadIdx.x % threads;
  constexpr int rows_at_once = threads / Layout::pieces;
  const int piece = thread % Layout::pieces;
#pragma unroll 4
  for (int row = thread / Layout::pieces; row < kTile; row += rows_at_once) {
    const bool exists = first + row < end;
    const int64_t at = exists ? cache_row(s, sequence, kv_head, first + row) * head_dim + piece * 8 : 0;
    ptx::copy_async_16(stage + Layout::key(row, piece), caches.k + at, exists);
    ptx::copy_async_16(stage + Layout::bytes + Layout::value(row, piece), caches.v + at, exists);
  }
}

// As above; the scales come eight at a time, so up to seven behind `end` come along.
template <int head_dim, int threads>
__device__ __forceinline__ void load_tile(const AttentionShape& s, const Caches<int8_t>& caches, int sequence,
                                          int kv_head, int first, int end, unsigned char* stage) {
  using Tile = Int8Tile<head_dim>;
  const int thread = threadIdx.x % threads;
  constexpr int rows_at_once = threads / Tile::pieces;
  const int piece = thread % Tile::pieces;
#pragma unroll 4
  for (int row = thread / Tile::pieces; row < kTile; row += rows_at_once) {
    const bool exists = first + row < end;
    const int64_t at = exists ? cache_row(s, sequence, kv_head, first + row) * head_dim + piece * 16 : 0;
    ptx::copy_async_16(stage + Tile::key(row, piece), caches.k + at, exists);
    ptx::copy_async_16(stage + Tile::value(row, piece), caches.v + at, exists);
  }
  const int eight = thread * 8;
  if (eight < kTile) {
    const bool exists = first + eight < end;
    const int64_t at = exists ? cache_row(s, sequence, kv_head, first + eight) : 0;
    ptx::copy_async_16(stage + Tile::key_scale(eight), caches.k_scales + at, exists);
    ptx::copy_async_16(stage + Tile::value_scale(eight), caches.v_scales + at, exists);
  }
}

__device__ __forceinline__ const bf16* query_row(const AttentionShape& s, const SequenceWork& work,
                                                 const bf16* q, int kv_head, int row, int head_dim) {
  if (row >= work.num_rows) return nullptr;
  const int group = s.heads_per_kv();
  const int64_t token = work.first_query + row / group;
  return q + (token * s.num_heads + kv_head * group + row % group) * head_dim;
}

// ---- results ----

// One row's share of a lane, in the columns of the tile. `row` of the whole sequence.
template <int head_dim, class Tile>
__device__ __forceinline__ void store_result(const AttentionShape& s, const SequenceWork& work, bool is_whole,
                                             int kv_head, int row, const float (&out)[head_dim / 8][2],
                                             float sum, float largest, float* partial, bf16* result) {
  if (row >= work.num_rows) return;
  if (is_whole) {
    const int group = s.heads_per_kv();
    const int64_t token = work.first_query + row / group;
    Tile::store(out, 1.0f / sum, result + (token * s.num_heads + kv_head * group + row % group) * head_dim);
    return;
  }
  Tile::store(out, partial);
  if (threadIdx.x % 4 == 0) *reinterpret_cast<float2*>(partial + head_dim) = make_float2(sum, largest);
}

template <int head_dim>
__device__ __forceinline__ void row_of(const Running<head_dim>& run, int r, float (&out)[head_dim / 8][2]) {
#pragma unroll
  for (int n = 0; n < head_dim / 8; ++n) {
    out[n][0] = run.out[n][r * 2];
    out[n][1] = run.out[n][r * 2 + 1];
  }
}

// ---- decode: a warp per segment ----

// A walk over the tiles of this warp's tasks: tasks first, first + step, ...
struct TileWalk {
  const AttentionShape& shape;
  const AttentionPlan& plan;
  int index, step, end;  // tasks x KV heads
  int task = 0, kv_head = 0, sequence = 0, segment = 0, position = 0, limit = 0;

  __device__ TileWalk(const AttentionShape& shape, const AttentionPlan& plan)
      : shape(shape), plan(plan), index(blockIdx.x), step(gridDim.x) {
    end = plan.num_tasks[0] * shape.num_kv_heads;
    open();
  }
  __device__ bool is_done() const { return index >= end; }
  __device__ bool is_last_tile() const { return position + kTile >= limit; }
  __device__ void advance() {
    position += kTile;
    if (position < limit) return;
    index += step;
    open();
  }

 private:
  __device__ void open() {
    if (is_done()) return;
    task = index / shape.num_kv_heads;
    kv_head = index % shape.num_kv_heads;
    sequence = plan.tasks[0][task].sequence;
    segment = plan.tasks[0][task].part;
    position = segment * kSegment;
    limit = min(position + kSegment, shape.kv_lens[sequence]);
  }
};

template <int head_dim, class Element>
__global__ void __launch_bounds__(32) decode_kernel(const AttentionShape shape, const AttentionPlan plan,
                                                    const bf16* q, const Caches<Element> caches, bf16* out) {
  using Tile = typename TileOf<head_dim, Element>::Type;
  unsigned char* stages = dynamic_shared();
  const int g = threadIdx.x / 4;
  TileWalk ahead(shape, plan), walk(shape, plan);
  int fill = 0, slot = 0;
  const auto load_next = [&] {
    if (!ahead.is_done()) {
      load_tile<head_dim, 32>(shape, caches, ahead.sequence, ahead.kv_head, ahead.position, ahead.limit,
                              stages + fill * Tile::bytes);
      fill = (fill + 1) % kStages;
      ahead.advance();
    }
    ptx::copy_async_commit();
  };
  load_next();
  while (!walk.is_done()) {
    const SequenceWork work(shape, walk.sequence);
    const int group = shape.heads_per_kv();
    Queries<head_dim> queries;
    queries.load(query_row(shape, work, q, walk.kv_head, g, head_dim),
                 query_row(shape, work, q, walk.kv_head, g + 8, head_dim));
    const int visible[2] = {work.visible(g, group), work.visible(g + 8, group)};
    const bool is_whole = work.num_segments() == 1;
    float* partial = partial_row<head_dim>(plan, false, walk.task, walk.kv_head, shape.num_kv_heads, g);
    const int kv_head = walk.kv_head;
    Running<head_dim> run;
    for (bool is_last = false; !is_last; walk.advance()) {
      is_last = walk.is_last_tile();
      const int position = walk.position, num_keys = walk.limit - position;
      load_next();
      ptx::copy_async_wait<kStages - 1>();
      __syncwarp();  // the whole warp's copies have landed
      const Tile tile(stages + slot * Tile::bytes, num_keys);
      const int seen[2] = {visible[0] - position, visible[1] - position};
      attend_tile(queries, tile, seen, shape.scale_log2, run);
      __syncwarp();  // the whole warp has read the slot that is filled next
      slot = (slot + 1) % kStages;
    }
    run.finish();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float row[head_dim / 8][2];
      row_of(run, r, row);
      store_result<head_dim, Tile>(shape, work, is_whole, kv_head, g + r * 8, row, run.sum[r], run.largest[r],
                                   partial + r * 8 * (head_dim + 2), out);
    }
  }
}

// ---- prefill: a block per 128 rows and span ----

// The running totals of a lane's two rows in shared memory: only the lane itself reads them.
template <int head_dim>
struct SpanTotal {
  float4* out;  // [head_dim / 8][32] of the warp, this lane's column
  float sum[2] = {0, 0};
  float largest[2] = {-INFINITY, -INFINITY};

  __device__ void merge(Running<head_dim>& run, bool is_first) {
    run.finish();
    const Merge low(largest[0], run.largest[0]), high(largest[1], run.largest[1]);
    sum[0] = low(sum[0], run.sum[0]);
    sum[1] = high(sum[1], run.sum[1]);
    largest[0] = low.largest;
    largest[1] = high.largest;
#pragma unroll
    for (int n = 0; n < head_dim / 8; ++n) {
      const float4 before = is_first ? make_float4(0, 0, 0, 0) : out[n * 32];
      const float (&now)[4] = run.out[n];
      out[n * 32] = make_float4(low(before.x, now[0]), low(before.y, now[1]), high(before.z, now[2]),
                                high(before.w, now[3]));
    }
  }
  __device__ void row_of(int r, float (&row)[head_dim / 8][2]) const {
#pragma unroll
    for (int n = 0; n < head_dim / 8; ++n) {
      const float4 v = out[n * 32];
      row[n][0] = r ? v.z : v.x;
      row[n][1] = r ? v.w : v.y;
    }
  }
};

template <int head_dim, class Element>
__global__ void __launch_bounds__(kPrefillThreads)
    prefill_kernel(const AttentionShape shape, const AttentionPlan plan, const bf16* q,
                   const Caches<Element> caches, bf16* out) {
  using Tile = typename TileOf<head_dim, Element>::Type;
  unsigned char* stages = dynamic_shared();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, group = shape.heads_per_kv();
  auto* totals = reinterpret_cast<float4*>(stages + kStages * Tile::bytes) + warp * head_dim / 8 * 32 + lane;
  const int num_tasks = plan.num_tasks[1] * shape.num_kv_heads;
  for (int index = blockIdx.x; index < num_tasks; index += gridDim.x) {
    const int task = index / shape.num_kv_heads, kv_head = index % shape.num_kv_heads;
    const AttentionTask what = plan.tasks[1][task];
    const SequenceWork work(shape, what.sequence);
    const int spans = work.num_spans(), first_row = what.part / spans * kLongRows;
    const int begin = what.part % spans * kSpan, row = first_row + warp * 16 + g;
    const int last_row = min(first_row + kLongRows, work.num_rows) - 1;
    const int end = min(begin + kSpan, work.visible(last_row, group));  // nobody here sees more
    const int visible[2] = {work.visible(row, group), work.visible(row + 8, group)};
    const int warp_end = work.visible(min(first_row + warp * 16 + 15, last_row), group);

    Queries<head_dim> queries;
    queries.load(query_row(shape, work, q, kv_head, row, head_dim),
                 query_row(shape, work, q, kv_head, row + 8, head_dim));
    SpanTotal<head_dim> total{totals};
    Running<head_dim> run;
    bool is_first = true;
    __syncthreads();  // the stages of the task before have been read
    if (begin < end) {
      load_tile<head_dim, kPrefillThreads>(shape, caches, what.sequence, kv_head, begin, end, stages);
    }
    ptx::copy_async_commit();
    for (int position = begin; position < end; position += kTile) {
      ptx::copy_async_wait<0>();
      __syncthreads();  // this tile has landed, and the other stage has been read
      const int slot = (position - begin) / kTile % kStages;
      if (position + kTile < end) {
        load_tile<head_dim, kPrefillThreads>(shape, caches, what.sequence, kv_head, position + kTile, end,
                                             stages + (1 - slot) * Tile::bytes);
      }
      ptx::copy_async_commit();
      if (position < warp_end) {
        const Tile tile(stages + slot * Tile::bytes, end - position);
        const int seen[2] = {visible[0] - position, visible[1] - position};
        attend_tile(queries, tile, seen, shape.scale_log2, run);
      }
      const bool ends_segment = (position + kTile) % kSegment == 0 || position + kTile >= end;
      if (ends_segment) {
        total.merge(run, is_first);
        is_first = false;
        run = Running<head_dim>();
      }
    }
    if (is_first) total.merge(run, true);  // a span that none of these rows reaches
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float values[head_dim / 8][2];
      total.row_of(r, values);
      float* partial =
          partial_row<head_dim>(plan, true, task, kv_head, shape.num_kv_heads, warp * 16 + g + r * 8);
      store_result<head_dim, Tile>(shape, work, spans == 1, kv_head, row + r * 8, values, total.sum[r],
                                   total.largest[r], partial, out);
    }
  }
}

// ---- launching ----

template <int head_dim, class Element>
Status launch_attention(Stream stream, const AttentionShape& shape, const AttentionPlan& plan,
                        const AttentionLimits& limits, const bf16* q, const Caches<Element>& caches,
                        bf16* out) {
  constexpr int64_t stages = kStages * TileOf<head_dim, Element>::Type::bytes;
  constexpr int64_t totals = int64_t(kLongRows) * head_dim * 4;
  constexpr int64_t warps = sizeof(Element) == 1 ? 6 : 3;  // of decode on a multiprocessor at once
  const int64_t multiprocessors = num_multiprocessors();
  if (limits.short_tasks > 0) {
    const dim3 grid(unsigned(std::min(limits.short_tasks * shape.num_kv_heads, multiprocessors * warps)));
    if (Status status = launch({"decode_attention", grid, 32, stages, stream},
                               decode_kernel<head_dim, Element>, shape, plan, q, caches, out)) {
      return status;
    }
  }
  if (limits.long_tasks > 0) {
    const dim3 grid(unsigned(std::min(limits.long_tasks * shape.num_kv_heads, multiprocessors)));
    if (Status status = launch({"prefill_attention", grid, kPrefillThreads, stages + totals, stream},
                               prefill_kernel<head_dim, Element>, shape, plan, q, caches, out)) {
      return status;
    }
  }
  const dim3 grid{unsigned(shape.num_queries), unsigned(shape.num_heads)};
  return launch({"merge_attention", grid, kMergeThreads, 0, stream}, merge_kernel<head_dim>, shape, plan,
                out);
}

template <class Element>
Status attend(Stream stream, const void* q, const Caches<Element>& caches,
              const octet::cpu::PagedBatch& batch, float scale, void* out, int64_t m, int64_t num_heads,
              const octet::cpu::KvShape& kv, const AttentionLimits& limits, void* workspace) {
  if (num_heads % kv.num_kv_heads != 0) return "num_heads must be a multiple of num_kv_heads";
  if (num_heads / kv.num_kv_heads > kShortRows) return "a KV head may serve at most 16 query heads";
  if (kv.block_size & (kv.block_size - 1)) return "block_size must be a power of two";
  if (m == 0) return nullptr;
  const AttentionWorkspace layout(limits, batch.num_sequences, kv.num_kv_heads, kv.head_dim);
  const auto run = [&](auto launcher) {
    return launcher(stream, shape_of(batch, scale, m, num_heads, kv), layout.at(workspace), limits,
                    static_cast<const bf16*>(q), caches, static_cast<bf16*>(out));
  };
  switch (kv.head_dim) {
    case 32:
      return run(launch_attention<32, Element>);
    case 64:
      return run(launch_attention<64, Element>);
    case 128:
      return run(launch_attention<128, Element>);
  }
  return "head_dim must be 32, 64 or 128";
}

}  // namespace

Status paged_attention(Stream stream, const void* q, const void* k_cache, const void* v_cache,
                       const octet::cpu::PagedBatch& batch, float scale, void* out, int64_t m,
                       int64_t num_heads, const octet::cpu::KvShape& kv, const AttentionLimits& limits,
                       void* workspace) {
  const Caches<bf16> caches{static_cast<const bf16*>(k_cache), static_cast<const bf16*>(v_cache), nullptr,
                            nullptr};
  return attend(stream, q, caches, batch, scale, out, m, num_heads, kv, limits, workspace);
}

Status paged_attention_int8(Stream stream, const void* q, const Int8Caches& kept,
                            const octet::cpu::PagedBatch& batch, float scale, void* out, int64_t m,
                            int64_t num_heads, const octet::cpu::KvShape& kv, const AttentionLimits& limits,
                            void* workspace) {
  if (kv.block_size < 8) return "block_size must be at least 8 for an int8 cache";
  const Caches<int8_t> caches{kept.k, kept.v, reinterpret_cast<const bf16*>(kept.k_scales),
                              reinterpret_cast<const bf16*>(kept.v_scales)};
  return attend(stream, q, caches, batch, scale, out, m, num_heads, kv, limits, workspace);
}

}  // namespace octet::gpu

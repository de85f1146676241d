// gpu/grouped_linear.cuh   y[r, :] = x[r, :] @ W_e^T for rows sorted by expert, all experts in one launch
//
//   x [rows, K] bf16  read once per 16..64 outputs, from L2     W packed tiles  read once per 8..32 rows
//   y [rows, N]       written once
//
//   bytes   the weights of every expert that has a row, N K bits / 8 each, + x, + y
//           -> bandwidth bound up to about 64 rows per expert, then tensor cores
//   map     a task is `row_tiles` tiles of 16 outputs x `tokens` rows of one expert. Blocks stay and take
//           tasks blockIdx.x, + gridDim.x, ...; the task list is the running sum of the experts' task counts,
//           made by each block from `starts`, so the host never learns how rows were routed.
//           In a block each of 8 warps takes every eighth column tile (64 inputs) of the same outputs.
//           Weights are the m operand (16 outputs), rows the n operand (8), so one row wastes 7/8 of n and no
//           bytes. Each warp runs its own ring of cp.async stages, weights and activations together; the ring
//           goes on into the next task while the block still adds up the last one.
//   needs   K % 8 == 0, rows 16-byte aligned, at most 256 experts, sm_80
//   order   a column tile: four mma, ascending (int4: two halves of two, each times its scale, added up);
//           warp w adds up its tiles w, w + 8, ... ascending; the warps' sums are added 0..7. It depends
//           on K alone: neither the tile shape nor the batch changes a bit.
//   source  our own; task list and no gather as in HPC-Ops' fused MoE, weight packing as in Frantar et al.
//           2024, arXiv:2408.11743, sliced K as in CUTLASS
//   twin    cpu/moe.cc, cpu/linear.cc
//   speed   not yet measured

#pragma once

#include <algorithm>

#include "activation.cuh"
#include "grouped_linear.h"
#include "tiles.cuh"

namespace octet::gpu {

constexpr int kSlices = 8;  // warps of a block; part of the order, never to be tuned per shape
constexpr int kGemmThreads = kSlices * 32;

// The part of a product that one block turn computes.
struct Task {
  int group, row_tile, first_row, num_rows;  // rows of x and y: [first_row, first_row + num_rows)
};

// `blocks` of them are to fit on a multiprocessor at once.
template <WeightKind kind_, int row_tiles_, int tokens_, int stages_, int blocks_>
struct GemmShape {
  using Reader = TileReader<kind_>;
  static constexpr WeightKind kind = kind_;
  static constexpr int row_tiles = row_tiles_, tokens = tokens_, stages = stages_;
  static constexpr int blocks = blocks_;
  static constexpr int outputs = row_tiles * 16, token_tiles = tokens / 8;
  static constexpr int weight_bytes = row_tiles * Reader::kPieces * 512;
  static constexpr int scale_bytes =
      kind == WeightKind::int4 ? row_tiles * 64 : 0;  // two groups of 32 at most
  static constexpr int stage_bytes = weight_bytes + scale_bytes + tokens * 128;
  static constexpr int sum_tokens = tokens < 16 ? tokens : 16;  // of one turn of the final sum
  static constexpr int sum_stride = outputs + 4;                // floats; 4 keeps the lanes' stores apart
  static constexpr int sum_bytes = kSlices * sum_tokens * sum_stride * 4;
  static constexpr int shared_bytes = kSlices * stages * stage_bytes + sum_bytes + kSlices * tokens * 4;
};

// The tasks of every group as a running sum, in shared memory.
template <class Shape>
struct TaskList {
  const GroupedLinear& problem;
  const int* ends;  // [num_groups] tasks up to and including group e

  __device__ int total() const { return ends[problem.num_groups - 1]; }

  __device__ const PackedWeight& weight(int group) const {
    return problem.pools[group / problem.groups_per_pool];
  }
  __device__ static int starts_of(const GroupedLinear& p, int group) {
    return p.starts ? p.starts[group] : group * p.num_rows;
  }
  __device__ static int row_blocks(const PackedWeight& w) {
    return (w.row_tiles() + Shape::row_tiles - 1) / Shape::row_tiles;
  }

  // Row tiles outside, rows inside: neighbouring blocks share weights in L2.
  __device__ Task find(int index) const {
    int low = 0, high = problem.num_groups - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (ends[middle] > index) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const int start = starts_of(problem, low), rows = starts_of(problem, low + 1) - start;
    const int row_parts = (rows + Shape::tokens - 1) / Shape::tokens;
    const int local = index - (low ? ends[low - 1] : 0), part = local % row_parts;
    return {low, local / row_parts * Shape::row_tiles, start + part * Shape::tokens,
            min(Shape::tokens, rows - part * Shape::tokens)};
  }
};

// Fills `ends` with the whole block; 256 groups at most.
template <class Shape>
__device__ void count_tasks(const GroupedLinear& problem, int* ends) {
  OCTET_SHARED(int, warp_sums, kSlices);
  const int group = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int count = 0;
  if (group < problem.num_groups) {
    using List = TaskList<Shape>;
    const int rows = List::starts_of(problem, group + 1) - List::starts_of(problem, group);
    const PackedWeight& weight = problem.pools[group / problem.groups_per_pool];
    count = (rows + Shape::tokens - 1) / Shape::tokens * List::row_blocks(weight);
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, count, step);
    if (lane >= step) count += before;
  }
  if (lane == 31) warp_sums[warp] = count;
  __syncthreads();
  for (int earlier = 0; earlier < warp; ++earlier) count += warp_sums[earlier];
  if (group < problem.num_groups) ends[group] = count;
  __syncthreads();
}

// One warp's walk over the column tiles of its tasks, some stages ahead of the products.
template <class Shape>
class Loader {
 public:
  __device__ Loader(const TaskList<Shape>& list, unsigned char* stages, int* input_rows)
      : list_(list), stages_(stages), input_rows_(input_rows), task_index_(blockIdx.x) {
    if (open_task()) skip_tasks_without_tiles();
  }

  // Starts copying the next column tile, if there is one; always closes a group of copies.
  __device__ void load_next() {
    if (task_index_ < list_.total()) {
      unsigned char* stage = stages_ + slot_ * Shape::stage_bytes;
      load_weights(stage);
      load_rows(stage + Shape::weight_bytes + Shape::scale_bytes);
      slot_ = slot_ + 1 == Shape::stages ? 0 : slot_ + 1;
      column_tile_ += kSlices;
      skip_tasks_without_tiles();
    }
    ptx::copy_async_commit();
  }

 private:
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int lane() { return threadIdx.x % 32; }

  // Looks up the task and where its rows of x begin. False when the list is at its end.
  __device__ bool open_task() {
    if (task_index_ >= list_.total()) return false;
    const GroupedLinear& p = list_.problem;
    task_ = list_.find(task_index_);
    column_tile_ = warp();
    __syncwarp();  // the rows of the task before were read
    for (int i = lane(); i < Shape::tokens; i += 32) {
      int row = task_.first_row + i;
      if (i >= task_.num_rows) {
        row = -1;  // reads nothing
      } else if (p.inputs) {
        row = p.inputs[row] / p.input_divisor;
      } else if (!p.starts) {
        row = (row - task_.group * p.num_rows) * p.num_groups + task_.group;
      }
      input_rows_[i] = row;
    }
    __syncwarp();
    return true;
  }

  __device__ void skip_tasks_without_tiles() {
    while (column_tile_ >= list_.weight(task_.group).column_tiles()) {
      task_index_ += gridDim.x;
      if (!open_task()) return;
    }
  }

  __device__ void load_weights(unsigned char* stage) const {
    const PackedWeight& w = list_.weight(task_.group);
    const int matrix = task_.group % list_.problem.groups_per_pool, tiles = w.column_tiles();
    constexpr int tile_bytes = Shape::Reader::kPieces * 512;
#pragma unroll
    for (int m = 0; m < Shape::row_tiles; ++m) {
      const int64_t tile = (int64_t(matrix) * w.row_tiles() + task_.row_tile + m) * tiles + column_tile_;
      const bool exists = task_.row_tile + m < w.row_tiles();
      const auto* from = static_cast<const unsigned char*>(w.tiles) + tile * tile_bytes;
#pragma unroll
      for (int piece = 0; piece < Shape::Reader::kPieces; ++piece) {
        const int at = piece * 512 + lane() * 16;
        ptx::copy_async_16(stage + m * tile_bytes + at, from + at, exists);
      }
      if (Shape::kind == WeightKind::int4 && lane() < 128 / w.group) {
        const int bytes = 2048 / w.group;  // 32 per group
        const auto* scales = static_cast<const unsigned char*>(w.scales) + tile * bytes;
        ptx::copy_async_16(stage + Shape::weight_bytes + m * 64 + lane() * 16, scales + lane() * 16, exists);
      }
    }
  }

  // Rows of 64 columns as eight 16-byte pieces; odd rows swap their halves so that the products' reads, two
  // rows at a time, meet all banks once.
  __device__ void load_rows(unsigned char* stage) const {
    const GroupedLinear& p = list_.problem;
    const int piece = lane() % 8, column = column_tile_ * 64 + piece * 8;
#pragma unroll
    for (int i = lane() / 8; i < Shape::tokens; i += 4) {
      const int row = input_rows_[i];
      const bool exists = row >= 0 && column < list_.weight(task_.group).in_features;
      const bf16* from = static_cast<const bf16*>(p.x) + row * p.x_stride + column;
      ptx::copy_async_16(stage + i * 128 + (piece ^ (i % 2 * 4)) * 16, from, exists);
    }
  }

  const TaskList<Shape>& list_;
  unsigned char* stages_;
  int* input_rows_;
  Task task_;
  int task_index_, column_tile_, slot_ = 0;
};

template <class Shape>
using Sums = float[Shape::row_tiles][Shape::token_tiles][4];

// sums += weights[outputs, 64] @ rows[tokens, 64]^T of one stage.
template <class Shape>
__device__ __forceinline__ void multiply_stage(const unsigned char* stage, int group, Sums<Shape>& sums) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const unsigned char* rows = stage + Shape::weight_bytes + Shape::scale_bytes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 x[Shape::token_tiles];
#pragma unroll
    for (int n = 0; n < Shape::token_tiles; ++n) {
      const int row = n * 8 + g;
      x[n] = *reinterpret_cast<const uint4*>(rows + row * 128 + ((half * 4 + t) ^ (row % 2 * 4)) * 16);
    }
#pragma unroll
    for (int m = 0; m < Shape::row_tiles; ++m) {
      Operands weights[Shape::Reader::kParts];
      Shape::Reader::read(reinterpret_cast<const uint4*>(stage + m * Shape::Reader::kPieces * 512), lane,
                          half, weights);
      float low = 1, high = 1;  // scales of rows g and g + 8
      if (Shape::kind == WeightKind::int4) {
        const int which = group == 32 ? half : 0;
        const uint32_t pair =
            *reinterpret_cast<const uint32_t*>(stage + Shape::weight_bytes + m * 64 + which * 32 + g * 4);
        low = low_of(pair);
        high = high_of(pair);
      }
#pragma unroll
      for (int n = 0; n < Shape::token_tiles; ++n) {
        float part[4] = {0, 0, 0, 0};
        auto& into = Shape::kind == WeightKind::int4 ? part : sums[m][n];
#pragma unroll
        for (int p = 0; p < Shape::Reader::kParts; ++p) {
          ptx::mma(into, weights[p].a[0], {x[n].x, x[n].y});
          ptx::mma(into, weights[p].a[1], {x[n].z, x[n].w});
        }
        if (Shape::kind == WeightKind::int4) {
          sums[m][n][0] = __fmaf_rn(low, part[0], sums[m][n][0]);
          sums[m][n][1] = __fmaf_rn(low, part[1], sums[m][n][1]);
          sums[m][n][2] = __fmaf_rn(high, part[2], sums[m][n][2]);
          sums[m][n][3] = __fmaf_rn(high, part[3], sums[m][n][3]);
        }
      }
    }
  }
}

// The scale of one output (int8), else 1.
template <class Shape>
__device__ __forceinline__ float output_scale(const PackedWeight& w, int matrix, int row_tile, int place) {
  if (Shape::kind != WeightKind::int8) return 1;
  const int64_t tile = int64_t(matrix) * w.row_tiles() + row_tile;
  return load_one(static_cast<const bf16*>(w.scales) + tile * 16 + place % 8 * 2 + place / 8);
}

// Adds up the slices' sums in ascending order, some rows at a time, and writes the outputs.
template <class Shape>
__device__ void finish_task(const TaskList<Shape>& list, const Task& task, const Sums<Shape>& sums,
                            float* scratch) {
  const GroupedLinear& p = list.problem;
  const PackedWeight& w = list.weight(task.group);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int matrix = task.group % p.groups_per_pool;
  const int places = w.is_gated ? Shape::outputs / 2 : Shape::outputs;  // outputs per row
  const int width = w.is_gated ? w.out_features / 2 : w.out_features;
#pragma unroll
  for (int first = 0; first < Shape::tokens; first += Shape::sum_tokens) {
    if (first >= task.num_rows) break;
    __syncthreads();  // the turn before has been read
#pragma unroll
    for (int m = 0; m < Shape::row_tiles; ++m) {
#pragma unroll
      for (int n = 0; n < Shape::sum_tokens / 8; ++n) {
        float* to = scratch + (warp * Shape::sum_tokens + n * 8 + t * 2) * Shape::sum_stride + m * 16 + g;
        const float (&from)[4] = sums[m][first / 8 + n];
        to[0] = from[0];
        to[Shape::sum_stride] = from[1];
        to[8] = from[2];
        to[Shape::sum_stride + 8] = from[3];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < Shape::sum_tokens * places; i += kGemmThreads) {
      const int token = i / places, place = i % places, row = task.first_row + first + token;
      const int column = task.row_tile * (w.is_gated ? 8 : 16) + place;
      if (first + token >= task.num_rows || column >= width) continue;
      const int at = w.is_gated ? place / 8 * 16 + place % 8 : place;
      const float* slice = scratch + token * Shape::sum_stride + at;
      float y = slice[0], up = w.is_gated ? slice[8] : 0;
#pragma unroll
      for (int s = 1; s < kSlices; ++s) {
        slice += Shape::sum_tokens * Shape::sum_stride;
        y += slice[0];
        if (w.is_gated) up += slice[8];
      }
      const int tile = task.row_tile + at / 16;
      y *= output_scale<Shape>(w, matrix, tile, at % 16);
      if (w.is_gated) {
        y = silu(y) * (up * output_scale<Shape>(w, matrix, tile, at % 16 + 8));
      } else {
        if (p.bias) y += load_one(static_cast<const bf16*>(p.bias) + column);
        y = activated(y, p.activation);
      }
      const int64_t place_out = (p.outputs ? p.outputs[row] : row) * p.out_stride + column;
      if (p.out_is_float) {
        static_cast<float*>(p.out)[place_out] = y;
      } else {
        store_one(static_cast<bf16*>(p.out) + place_out, y);
      }
    }
  }
}

template <class Shape>
__global__ void __launch_bounds__(kGemmThreads, Shape::blocks)
    grouped_linear_kernel(const __grid_constant__ GroupedLinear problem) {
  OCTET_SHARED(int, ends, kMaxGroups);
  unsigned char* shared = dynamic_shared();
  const int warp = threadIdx.x / 32;
  unsigned char* stages = shared + warp * Shape::stages * Shape::stage_bytes;
  float* scratch = reinterpret_cast<float*>(shared + kSlices * Shape::stages * Shape::stage_bytes);
  int* input_rows =
      reinterpret_cast<int*>(shared + kSlices * Shape::stages * Shape::stage_bytes + Shape::sum_bytes) +
      warp * Shape::tokens;
  count_tasks<Shape>(problem, ends);
  const TaskList<Shape> list{problem, ends};
  Loader<Shape> loader(list, stages, input_rows);
#pragma unroll
  for (int i = 0; i < Shape::stages - 1; ++i) loader.load_next();

  int slot = 0;
  for (int index = blockIdx.x; index < list.total(); index += gridDim.x) {
    const Task task = list.find(index);
    const PackedWeight& w = list.weight(task.group);
    Sums<Shape> sums = {};
    for (int tile = warp; tile < w.column_tiles(); tile += kSlices) {
      ptx::copy_async_wait<Shape::stages - 2>();
      __syncwarp();  // the whole warp's copies have landed, and all have read the slot that is filled next
      loader.load_next();
      multiply_stage<Shape>(stages + slot * Shape::stage_bytes, w.group, sums);
      slot = slot + 1 == Shape::stages ? 0 : slot + 1;
    }
    finish_task<Shape>(list, task, sums, scratch);
  }
}

template <WeightKind kind, int row_tiles, int tokens, int stages, int blocks>
const char* launch_shape(void* stream, const GroupedLinear& p) {
  using Shape = GemmShape<kind, row_tiles, tokens, stages, blocks>;
  int64_t most_tasks = 0;  // no grid is larger than the work can be
  for (int pool = 0; pool * p.groups_per_pool < p.num_groups; ++pool) {
    // An expert's rows fill one tile more than they would side by side with all others.
    const int64_t full = ceil_div(p.num_rows, tokens);
    const int64_t rows = p.starts ? full + std::min(p.num_rows, p.groups_per_pool) : full * p.num_groups;
    most_tasks += rows * ceil_div(p.pools[pool].row_tiles(), row_tiles);
  }
  static_assert(Shape::shared_bytes <= 161 * 1024, "a block takes more shared memory than an A100 has");
  static_assert(blocks * (Shape::shared_bytes + 2304) <= 227 * 1024,
                "the blocks do not fit together on an H100");
  const int64_t grid = std::min(most_tasks, int64_t(num_multiprocessors()) * blocks);
  return launch({"grouped_linear", dim3(unsigned(grid)), kGemmThreads, Shape::shared_bytes, stream},
                grouped_linear_kernel<Shape>, p);
}

}  // namespace octet::gpu

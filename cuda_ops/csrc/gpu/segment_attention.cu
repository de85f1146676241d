// gpu/segment_attention.cu   Full attention inside segments: the patches of one image or video frame
//
//   out[i, h, :] = softmax(scale q[i, h, :] K^T) V over the patches of i's segment
//
//   qkv [P, 3, heads, head_dim] bf16   segment_starts [num_segments + 1]   out [P, heads * head_dim] bf16
//
//   bytes   K and V of a segment once per 128 patches and head, from L2   -> tensor cores
//   map     a block of 8 warps x 16 patches per 128 patches and head; tiles of 64 keys in two stages. A block
//           finds its segment by counting: segments hold at least their share of the P / 128 + segments
//           blocks
//   needs   head_dim 16, 64 or 80, 16-byte aligned rows, sm_80; segments may be empty; P may be 0. Patches
//           of no segment become zeros.
//   order   tiles ascend from the segment's first patch (attention.cuh): depends on the segment alone
//   source  Dao 2023, arXiv:2307.08691                            twin  cpu/segment_attention.cc
//   speed   not yet measured

#include "attention.cuh"
#include "launchers.h"

namespace octet::gpu {
namespace {

constexpr int kThreads = 256, kRows = 128, kStages = 2;

struct SegmentShape {
  const int32_t* starts;
  int num_segments, num_patches, heads;
  float scale_log2;
};

// The rows of one block: its segment and the first of its 128 patches, or none.
struct Place {
  int begin = 0, end = 0, first = 0;

  __device__ Place(const SegmentShape& s, int block) {
    for (int i = 0; i < s.num_segments; ++i) {
      begin = s.starts[i];
      end = s.starts[i + 1];
      const int blocks = (end - begin + kRows - 1) / kRows;
      if (block < blocks) {
        first = begin + block * kRows;
        return;
      }
      block -= blocks;
    }
    begin = end = first = 0;
  }
};

template <int head_dim>
__device__ __forceinline__ void load_tile(const bf16* keys, const bf16* values, int64_t stride, int first,
                                          int end, unsigned char* stage) {
  using Layout = TileLayout<head_dim>;
  for (int i = threadIdx.x; i < kTile * Layout::pieces; i += kThreads) {
    const int row = i / Layout::pieces, piece = i % Layout::pieces;
    const bool exists = first + row < end;
    const int64_t at = exists ? (first + row) * stride + piece * 8 : 0;
    ptx::copy_async_16(stage + Layout::key(row, piece), keys + at, exists);
    ptx::copy_async_16(stage + Layout::bytes + Layout::value(row, piece), values + at, exists);
  }
}

template <int head_dim>
__global__ void __launch_bounds__(kThreads)
    segment_attention_kernel(const SegmentShape shape, const bf16* qkv, bf16* out) {
  using Layout = TileLayout<head_dim>;
  unsigned char* stages = dynamic_shared();
  const int head = blockIdx.y, warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const Place place(shape, blockIdx.x);
  if (place.begin == place.end) return;
  const int64_t stride = int64_t(3) * shape.heads * head_dim;
  const bf16* keys = qkv + (shape.heads + head) * head_dim;
  const bf16* values = keys + shape.heads * head_dim;
  const int rows[2] = {place.first + warp * 16 + g, place.first + warp * 16 + g + 8};
  const auto query = [&](int row) {
    return row < place.end ? qkv + row * stride + head * head_dim : nullptr;
  };
  Queries<head_dim> queries;
  queries.load(query(rows[0]), query(rows[1]));
  Running<head_dim> run;
  load_tile<head_dim>(keys, values, stride, place.begin, place.end, stages);
  ptx::copy_async_commit();
  for (int position = place.begin; position < place.end; position += kTile) {
    ptx::copy_async_wait<0>();
    __syncthreads();  // this tile has landed, and the other stage has been read
    const int slot = (position - place.begin) / kTile % kStages;
    if (position + kTile < place.end) {
      load_tile<head_dim>(keys, values, stride, position + kTile, place.end,
                          stages + (1 - slot) * 2 * Layout::bytes);
    }
    ptx::copy_async_commit();
    const PlainTile<head_dim> tile(stages + slot * 2 * Layout::bytes, kTile);
    const int seen[2] = {place.end - position, place.end - position};
    attend_tile(queries, tile, seen, shape.scale_log2, run);
  }
  run.finish();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (rows[r] >= place.end) continue;
    bf16* to = out + (int64_t(rows[r]) * shape.heads + head) * head_dim;
    const float inverse = 1.0f / run.sum[r];
#pragma unroll
    for (int n = 0; n < head_dim / 8; ++n) {
      *reinterpret_cast<uint32_t*>(to + n * 8 + t * 2) =
          pack_bf16x2(run.out[n][r * 2] * inverse, run.out[n][r * 2 + 1] * inverse);
    }
  }
}

template <int head_dim>
Status launch_segments(Stream stream, const SegmentShape& shape, const bf16* qkv, bf16* out) {
  const dim3 grid{unsigned(ceil_div(shape.num_patches, kRows) + shape.num_segments), unsigned(shape.heads)};
  return launch({"segment_attention", grid, kThreads, kStages * 2 * TileLayout<head_dim>::bytes, stream},
                segment_attention_kernel<head_dim>, shape, qkv, out);
}

}  // namespace

Status segment_attention(Stream stream, const void* qkv, const int32_t* segment_starts, int64_t num_segments,
                         float scale, void* out, int64_t p, int64_t heads, int64_t head_dim) {
  if (p == 0) return nullptr;
  const SegmentShape shape{segment_starts, int(num_segments), int(p), int(heads), scale * 1.44269504f};
  const auto* from = static_cast<const bf16*>(qkv);
  auto* to = static_cast<bf16*>(out);
  // Patches of no segment: no block writes them.
  if (Status status = fill_bytes(out, 0, size_t(p * heads * head_dim * 2), stream)) return status;
  switch (head_dim) {
    case 16:
      return launch_segments<16>(stream, shape, from, to);
    case 64:
      return launch_segments<64>(stream, shape, from, to);
    case 80:
      return launch_segments<80>(stream, shape, from, to);
  }
  return "head_dim must be 16, 64 or 80";
}

}  // namespace octet::gpu

// gpu/pack.cu   Weight matrices into the tiles of packed_weight.h
//
//   source  [count, N, K] as WeightView has it: int4, int8, bf16 or fp32, scales bf16
//   tiles   count * PackedWeight::tile_bytes()      scales  count * PackedWeight::scale_bytes()
//
//   bytes   everything read once and written once; done at load, so reads need not be coalesced
//   map     a thread per 16 bytes of tiles, then a thread per pair of scales
//   needs   K % 8 == 0; gated: N % 16 == 0
//   order   no sums
//   source  our own layout; the idea of packing for the fragment is Frantar et al. 2024, arXiv:2408.11743
//   speed   not yet measured

#include "elements.cuh"
#include "launchers.h"

namespace octet::gpu {
namespace {

constexpr int kThreads = 256;

struct Source {
  WeightView view;
  PackedWeight packed;

  // The row of the matrix that place `place` (0..15) of a row tile holds; -1 for padding.
  __device__ int row(int row_tile, int place) const {
    if (packed.is_gated) {
      return row_tile * 8 + place % 8 + (place < 8 ? 0 : packed.out_features / 2);
    }
    const int row = row_tile * 16 + place;
    return row < packed.out_features ? row : -1;
  }
};

// The bits of one element, in the width of its kind; int4 with its offset of 8.
__device__ uint32_t bits_at(const Source& s, int64_t matrix, int row, int column) {
  const bool is_padding = row < 0 || column >= s.packed.in_features;
  const int64_t index = (matrix * s.packed.out_features + row) * s.packed.in_features + column;
  switch (s.packed.kind) {
    case WeightKind::int4: {
      if (is_padding) return 8;
      const uint32_t byte = static_cast<const uint8_t*>(s.view.data)[index / 2];
      return ((index % 2 ? byte >> 4 : byte) & 15u) ^ 8u;  // two's complement to offset
    }
    case WeightKind::int8:
      return is_padding ? 0 : static_cast<const uint8_t*>(s.view.data)[index];
    case WeightKind::bfloat16:
      return is_padding ? 0 : static_cast<const uint16_t*>(s.view.data)[index];
    case WeightKind::float32:
      return is_padding ? 0 : static_cast<const uint32_t*>(s.view.data)[index];
  }
  return 0;
}

__global__ void __launch_bounds__(kThreads) pack_tiles_kernel(Source s, uint4* tiles, int64_t num_lanes) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= num_lanes) return;
  const int pieces = int(s.packed.pieces_per_tile());
  const int piece = int(index / 32 % pieces);
  int64_t tile = index / 32 / pieces;
  const int column_tile = int(tile % s.packed.column_tiles());
  tile /= s.packed.column_tiles();
  const int row_tile = int(tile % s.packed.row_tiles());
  const int64_t matrix = tile / s.packed.row_tiles();

  // The values of these 16 bytes in the order lane, half, step, operand, column of the pair.
  const bool is_int4 = s.packed.kind == WeightKind::int4;
  const int values = 32 / pieces, width = 128 / values;  // how many, bits of each
  const int slot = int(index % 32);
  uint32_t words[4] = {0, 0, 0, 0};
  for (int e = 0; e < values; ++e) {
    const int element = is_int4 ? slot / 16 * 16 + e % 16 : piece * values + e;
    const int lane = is_int4 ? slot % 16 * 2 + e / 16 : slot, g = lane / 4, t = lane % 4;
    const int half = element / 16, step = element / 8 % 2, operand = element / 2 % 4, low = element % 2;
    const int column = column_tile * 64 + half * 32 + t * 8 + step * 4 + operand / 2 * 2 + low;
    const uint32_t bits = bits_at(s, matrix, s.row(row_tile, g + operand % 2 * 8), column);
    int place = e;
    if (is_int4) place = e / 8 * 8 + low * 4 + operand;
    if (s.packed.kind == WeightKind::int8) place = e / 4 * 4 + low * 2 + operand % 2;
    words[place * width / 32] |= bits << (place * width % 32);
  }
  tiles[index] = make_uint4(words[0], words[1], words[2], words[3]);
}

__global__ void __launch_bounds__(kThreads)
    pack_scales_kernel(Source s, uint16_t* scales, int64_t num_scales) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= num_scales) return;
  const int place = int(index / 2 % 8 + index % 2 * 8);
  const bool is_int4 = s.packed.kind == WeightKind::int4;
  const int groups_per_tile = is_int4 ? 64 / s.packed.group : 1;
  const int groups = is_int4 ? s.packed.column_tiles() * groups_per_tile : 1;
  const int group = int(index / 16 % groups);
  const int row_tile = int(index / 16 / groups % s.packed.row_tiles());
  const int64_t matrix = index / 16 / groups / s.packed.row_tiles();
  const int row = s.row(row_tile, place), present = is_int4 ? s.packed.in_features / s.packed.group : 1;
  uint16_t bits = 0;
  if (row >= 0 && group < present) {
    bits = reinterpret_cast<const uint16_t*>(
        s.view.scales)[(matrix * s.packed.out_features + row) * present + group];
  }
  scales[index] = bits;
}

}  // namespace

Status pack_weight(Stream stream, const WeightView& source, int64_t count, const PackedWeight& packed) {
  if (packed.in_features % 8 != 0) return "in_features must be a multiple of 8";
  if (packed.is_gated && packed.out_features % 16 != 0)
    return "a gated weight's width must be a multiple of 8";
  if (packed.kind == WeightKind::int4) {
    if (packed.group != 64 && packed.group != 32) return "int4 groups must be of 64 or 32 columns";
    if (packed.in_features % packed.group != 0) return "in_features must be a multiple of the int4 group";
  }
  const Source s{source, packed};
  const int64_t num_lanes = count * packed.tile_bytes() / 16, num_scales = count * packed.scale_bytes() / 2;
  if (num_lanes == 0) return nullptr;
  const Status status =
      launch({"pack_tiles", dim3(unsigned(ceil_div(num_lanes, kThreads))), kThreads, 0, stream},
             pack_tiles_kernel, s, static_cast<uint4*>(const_cast<void*>(packed.tiles)), num_lanes);
  if (status || num_scales == 0) return status;
  return launch({"pack_scales", dim3(unsigned(ceil_div(num_scales, kThreads))), kThreads, 0, stream},
                pack_scales_kernel, s, static_cast<uint16_t*>(const_cast<void*>(packed.scales)), num_scales);
}

}  // namespace octet::gpu

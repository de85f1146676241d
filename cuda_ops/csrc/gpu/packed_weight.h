// gpu/packed_weight.h   A weight matrix in the order in which tensor cores eat it
//
// The matrix is cut in tiles of 16 rows (outputs) x 64 columns (inputs), padded with zeros. Tiles lie row
// tile by row tile, so the warp that makes 16 outputs reads memory straight through. A tile is a few pieces
// of 512 bytes; in each, lane l of a warp owns bytes [16 l, 16 l + 16) (int4: [8 l, 8 l + 8) of each half, so
// that reads of 8 bytes meet all banks), which hold mma operands of its own:
//
//   lane l = 4 g + t holds rows g and g + 8 and, of each 32 columns, the eight columns [8 t, 8 t + 8): two
//   operands a of ptx::mma, with the columns {0,1} {0,1} {2,3} {2,3} (then + 4) of the eight, rows g, g + 8
//   in turn. Activations are read with the same columns, so the order of a product's terms is free.
//
//   int4      1 piece    nibble i of a word is operand i % 4, column i / 4 of its pair, stored as q + 8
//   int8      2 pieces   bytes 0, 2 of a word are a pair of row g, bytes 1, 3 of row g + 8, two's complement
//   bfloat16  4 pieces   the operand as it is
//   float32   8 pieces   two pieces per operand
//
// Scales (bf16): int4 [row tile][column tile][64 / group][8][2], int8 [row tile][8][2]; the last two indices
// are g and which of rows g and g + 8. A gated matrix (gate rows first, then up rows) is packed with gate
// rows in the places g and the up row of the same output in the places g + 8, so that SwiGLU finds both in
// one lane. Packed on the device by pack_weight; group is 64 or 32.

#pragma once

#include "../common/status.h"
#include "../include/weight_view.h"

#if defined(__CUDACC__)
#define OCTET_ANYWHERE __host__ __device__
#else
#define OCTET_ANYWHERE
#endif

namespace octet::gpu {

struct PackedWeight {
  WeightKind kind;
  int32_t group;  // columns per int4 scale: 64 or 32
  bool is_gated;
  const void* tiles;
  const void* scales;    // bf16; null unless quantised
  int32_t out_features;  // rows of one matrix, gate and up rows together
  int32_t in_features;   // columns; a multiple of 8

  OCTET_ANYWHERE int32_t row_tiles() const { return (out_features + 15) / 16; }
  OCTET_ANYWHERE int32_t column_tiles() const { return (in_features + 63) / 64; }
  OCTET_ANYWHERE int64_t pieces_per_tile() const {
    return kind == WeightKind::int4 ? 1 : kind == WeightKind::int8 ? 2 : kind == WeightKind::bfloat16 ? 4 : 8;
  }
  // Of one matrix of a stack.
  OCTET_ANYWHERE int64_t tile_bytes() const {
    return int64_t(row_tiles()) * column_tiles() * pieces_per_tile() * 512;
  }
  OCTET_ANYWHERE int64_t scale_bytes() const {
    const int64_t per_row_tile = kind == WeightKind::int4   ? column_tiles() * int64_t(64 / group)
                                 : kind == WeightKind::int8 ? 1
                                                            : 0;
    return row_tiles() * per_row_tile * 32;
  }
};

}  // namespace octet::gpu

// gpu/tiles.cuh   Packed weight tiles as mma operands: what a lane does with its bytes (packed_weight.h)
//
// Integers become bf16 by placing their bits under the exponent of 128, where a step is 1: 0x4300 | n is
// 128 + n. Every int4 and int8 value is exact in bf16; scales are applied to the fp32 sums.
#pragma once

#include <ptx.cuh>

#include "elements.cuh"
#include "packed_weight.h"

namespace octet::gpu {

// The mma operands of one row tile and 32 columns: two steps of 16.
struct Operands {
  uint32_t a[2][4];
};

__device__ __forceinline__ uint32_t int4_pair(uint32_t word, int i) {
  const uint32_t biased = (word >> (4 * i) & 0x000f000fu) | 0x43004300u;  // 128 + 8 + q
  return ptx::subtract_bf16x2(biased, 0x43084308u);
}

// Bytes 0 and 2 of the word: the low seven bits count up, the sign bit counts 128 down.
__device__ __forceinline__ uint32_t int8_pair(uint32_t word) {
  const uint32_t value = (word & 0x007f007fu) | 0x43004300u, sign = (word & 0x00800080u) | 0x43004300u;
  return ptx::subtract_bf16x2(value, sign);
}

// A float as the sum of three bf16, exactly up to its 24 bits.
struct Split {
  float part[3];
};
__device__ __forceinline__ Split split(float value) {
  const float high = as_stored(value, bf16{});
  const float middle = as_stored(value - high, bf16{});
  return {{high, middle, value - high - middle}};
}

// How each kind of weight reads half `half` (32 columns) of a tile in shared memory.
template <WeightKind kind>
struct TileReader;

template <>
struct TileReader<WeightKind::int4> {
  static constexpr int kPieces = 1, kParts = 1;
  __device__ __forceinline__ static void read(const uint4* tile, int lane, int half, Operands (&out)[1]) {
    const uint2 words = reinterpret_cast<const uint2*>(tile)[half * 32 + lane];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[0].a[0][i] = int4_pair(words.x, i);
      out[0].a[1][i] = int4_pair(words.y, i);
    }
  }
};

template <>
struct TileReader<WeightKind::int8> {
  static constexpr int kPieces = 2, kParts = 1;
  __device__ __forceinline__ static void read(const uint4* tile, int lane, int half, Operands (&out)[1]) {
    const uint4 v = tile[half * 32 + lane];
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[0].a[i / 2][i % 2 * 2] = int8_pair(words[i]);
      out[0].a[i / 2][i % 2 * 2 + 1] = int8_pair(words[i] >> 8);
    }
  }
};

template <>
struct TileReader<WeightKind::bfloat16> {
  static constexpr int kPieces = 4, kParts = 1;
  __device__ __forceinline__ static void read(const uint4* tile, int lane, int half, Operands (&out)[1]) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint4 v = tile[(half * 2 + step) * 32 + lane];
      out[0].a[step][0] = v.x;
      out[0].a[step][1] = v.y;
      out[0].a[step][2] = v.z;
      out[0].a[step][3] = v.w;
    }
  }
};

// Three operands that sum to the fp32 weights: the products with bf16 activations are then as good as fp32.
template <>
struct TileReader<WeightKind::float32> {
  static constexpr int kPieces = 8, kParts = 3;
  __device__ __forceinline__ static void read(const uint4* tile, int lane, int half, Operands (&out)[3]) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int pair = 0; pair < 4; pair += 2) {
        const uint4 v = tile[((half * 2 + step) * 2 + pair / 2) * 32 + lane];
        const Split x = split(__uint_as_float(v.x)), y = split(__uint_as_float(v.y));
        const Split z = split(__uint_as_float(v.z)), w = split(__uint_as_float(v.w));
#pragma unroll
        for (int part = 0; part < 3; ++part) {
          out[part].a[step][pair] = pack_bf16x2(x.part[part], y.part[part]);
          out[part].a[step][pair + 1] = pack_bf16x2(z.part[part], w.part[part]);
        }
      }
    }
  }
};

}  // namespace octet::gpu

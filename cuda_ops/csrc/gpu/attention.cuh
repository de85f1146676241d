// gpu/attention.cuh   Sixteen query rows against a tile of 64 keys and values: the heart of every attention
//
// What is shared by paged_attention.cu (causal, KV in blocks) and segment_attention.cu (whole segments): how
// tiles lie in shared memory, the two products, the running softmax, and how partial results are merged.
// Tiles of int8 keys and values are in attention_int8.cuh.
//
//   S = Q K^T (mma; K is read with the columns in the order in which a lane holds Q, see tiles.cuh)
//   m' = max(m, max S), P = exp2(S - m'), l = l exp2(m - m') + sum P, O = O exp2(m - m') + P V
//
// S counts in units of log2: scale * log2(e) is folded into the exponent. A row that sees nothing of a tile
// is left as it was, to the bit, so it does not matter which other rows made the tile necessary. Products and
// sums that could be contracted are written as fused ones, so that every kernel rounds alike.

#pragma once

#include <ptx.cuh>

#include "elements.cuh"

namespace octet::gpu {

constexpr int kTile = 64;  // keys; part of the order

// How [64][head_dim] bf16 lie in shared memory, as 16-byte pieces swapped so that no two lanes of a read
// meet in a bank. K is read two rows x four pieces at a time, V eight rows x one piece.
template <int head_dim>
struct TileLayout {
  static_assert(head_dim % 16 == 0);
  // A multiple of 128, or 64 more than one: two neighbouring rows then cover different banks.
  static constexpr int row_bytes = head_dim % 64 == 0 ? head_dim * 2 : (head_dim + 31) / 64 * 128 + 64;
  static constexpr int pieces = head_dim / 8;
  static constexpr int bytes = kTile * row_bytes;
  static constexpr bool is_wide = row_bytes % 128 == 0;

  __device__ static int key(int row, int piece) {
    return row * row_bytes + (piece ^ (is_wide ? row % 2 * 4 : row / 2 % 2 * 2)) * 16;
  }
  __device__ static int value(int row, int piece) {
    return row * row_bytes + (piece ^ (is_wide ? row % 8 : row / 2 % 4)) * 16;
  }
};

// Rows g and g + 8 of a warp's sixteen, as a lane holds them.
template <int head_dim>
struct Queries {
  uint32_t whole[head_dim / 32 > 0 ? head_dim / 32 : 1][2][4];  // per 32 columns, two steps
  uint32_t rest[4];                                             // the last 16, if any

  // Null rows count as zeros.
  __device__ void load(const bf16* low, const bf16* high) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < head_dim / 32; ++c) {
      const uint4 v = low ? *reinterpret_cast<const uint4*>(low + c * 32 + t * 8) : uint4{};
      const uint4 w = high ? *reinterpret_cast<const uint4*>(high + c * 32 + t * 8) : uint4{};
      fill(whole[c][0], v.x, w.x, v.y, w.y);
      fill(whole[c][1], v.z, w.z, v.w, w.w);
    }
    if (head_dim % 32 != 0) {
      const int column = head_dim / 32 * 32 + t * 4;
      const uint2 v = low ? *reinterpret_cast<const uint2*>(low + column) : uint2{};
      const uint2 w = high ? *reinterpret_cast<const uint2*>(high + column) : uint2{};
      fill(rest, v.x, w.x, v.y, w.y);
    }
  }

 private:
  __device__ static void fill(uint32_t (&to)[4], uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    to[0] = a;
    to[1] = b;
    to[2] = c;
    to[3] = d;
  }
};

// The running softmax of rows g and g + 8. `sum` is this lane's share until `finish`.
template <int head_dim>
struct Running {
  float largest[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};
  float out[head_dim / 8][4] = {};

  // Adds up the four lanes of each row.
  __device__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
    }
  }
};

__device__ __forceinline__ float finite_or_zero(float largest) {
  return largest == -INFINITY ? 0 : largest;
}

// Merges a later partial result into an earlier one: how much of each remains.
struct Merge {
  float largest, keep, take;

  __device__ Merge(float earlier, float later) {
    largest = fmaxf(earlier, later);
    const float base = finite_or_zero(largest);
    keep = ptx::exp2_fast(earlier - base);
    take = ptx::exp2_fast(later - base);
  }
  __device__ float operator()(float earlier, float later) const {
    return __fmaf_rn(earlier, keep, __fmul_rn(later, take));
  }
};

// A tile of bf16 keys and values in shared memory, as attend_tile uses it.
template <int head_dim>
struct PlainTile {
  using Layout = TileLayout<head_dim>;
  static constexpr int bytes = 2 * Layout::bytes;  // of one stage

  const unsigned char *keys, *values;

  __device__ PlainTile(const unsigned char* stage, int) : keys(stage), values(stage + Layout::bytes) {}

  // s = scores of keys [8 n, 8 n + 8)
  __device__ __forceinline__ void score(const Queries<head_dim>& q, int n, float (&s)[4]) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, row = n * 8 + g;
#pragma unroll
    for (int c = 0; c < head_dim / 32; ++c) {
      const uint4 k = *reinterpret_cast<const uint4*>(keys + Layout::key(row, c * 4 + t));
      ptx::mma(s, q.whole[c][0], {k.x, k.y});
      ptx::mma(s, q.whole[c][1], {k.z, k.w});
    }
    if (head_dim % 32 != 0) {
      const auto* piece = keys + Layout::key(row, head_dim / 32 * 4 + t / 2) + t % 2 * 8;
      const uint2 k = *reinterpret_cast<const uint2*>(piece);
      ptx::mma(s, q.rest, {k.x, k.y});
    }
  }

  // What the probabilities of keys 8 n + 2 t and the next are multiplied by before they meet the values.
  __device__ __forceinline__ float2 value_scales(int) const { return make_float2(1, 1); }
  static constexpr bool has_scales = false;

  // out += p @ values of keys [16 k, 16 k + 16). out[n] are columns [8 n, 8 n + 8): a lane has 2 t and the
  // next.
  __device__ __forceinline__ void add_values(const uint32_t (&p)[4], int k,
                                             float (&out)[head_dim / 8][4]) const {
    const int lane = threadIdx.x % 32, row = k * 16 + lane % 16;
#pragma unroll
    for (int n = 0; n < head_dim / 8; n += 2) {
      uint32_t v[4];
      ptx::ldmatrix_x4_trans(v, values + Layout::value(row, n + lane / 16));
      ptx::mma(out[n], p, {v[0], v[1]});
      ptx::mma(out[n + 1], p, {v[2], v[3]});
    }
  }

  // The values out[..][2 r] and out[..][2 r + 1] of a lane, bf16 times `factor`, to a row of the result.
  __device__ static void store(const float (&v)[head_dim / 8][2], float factor, bf16* row) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < head_dim / 8; ++n) {
      *reinterpret_cast<uint32_t*>(row + n * 8 + t * 2) = pack_bf16x2(v[n][0] * factor, v[n][1] * factor);
    }
  }
  __device__ static void store(const float (&v)[head_dim / 8][2], float* row) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < head_dim / 8; ++n) {
      *reinterpret_cast<float2*>(row + n * 8 + t * 2) = make_float2(v[n][0], v[n][1]);
    }
  }
};

// One tile, `visible[r]` keys of it seen by row g + 8 r.
template <int head_dim, class Tile>
__device__ __forceinline__ void attend_tile(const Queries<head_dim>& q, const Tile& tile,
                                            const int (&visible)[2], float scale_log2,
                                            Running<head_dim>& run) {
  const int t = threadIdx.x % 4;
  float s[kTile / 8][4];
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n) {
    s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
    tile.score(q, n, s[n]);
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = -INFINITY;
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[n][r * 2 + i];
        x = n * 8 + t * 2 + i < visible[r] ? __fmul_rn(x, scale_log2) : -INFINITY;
        largest = fmaxf(largest, x);
      }
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    const float now = fmaxf(run.largest[r], largest), base = finite_or_zero(now);
    const float keep = ptx::exp2_fast(run.largest[r] - base);
    run.largest[r] = now;
    run.sum[r] = __fmul_rn(run.sum[r], keep);
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[n][r * 2 + i];
        x = ptx::exp2_fast(x - base);
        run.sum[r] += x;
      }
    }
#pragma unroll
    for (int n = 0; n < head_dim / 8; ++n) {
      run.out[n][r * 2] = __fmul_rn(run.out[n][r * 2], keep);
      run.out[n][r * 2 + 1] = __fmul_rn(run.out[n][r * 2 + 1], keep);
    }
  }

  if (Tile::has_scales) {
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
      const float2 scale = tile.value_scales(n);
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = __fmul_rn(s[n][i], i % 2 ? scale.y : scale.x);
    }
  }
#pragma unroll
  for (int k = 0; k < kTile / 16; ++k) {
    const uint32_t p[4] = {pack_bf16x2(s[2 * k][0], s[2 * k][1]), pack_bf16x2(s[2 * k][2], s[2 * k][3]),
                           pack_bf16x2(s[2 * k + 1][0], s[2 * k + 1][1]),
                           pack_bf16x2(s[2 * k + 1][2], s[2 * k + 1][3])};
    tile.add_values(p, k, run.out);
  }
}

}  // namespace octet::gpu

// gpu/attention_int8.cuh   A tile of 64 int8 keys and values, each with a scale of its own
//
//   keys, values [64][head_dim] int8, then their scales [64] bf16 twice
//
// Every int8 value is exact in bf16 (tiles.cuh), so the products are those of attention.cuh: scores are
// multiplied by their key's scale afterwards, probabilities by their value's scale before. No value is ever
// transposed: a lane reads four columns of four keys and owns the columns [32 c + 8 t, + 8) of the result.

#pragma once

#include "attention.cuh"
#include "tiles.cuh"

namespace octet::gpu {

template <int head_dim>
struct Int8Tile {
  static_assert(head_dim % 32 == 0 && head_dim <= 128);
  static constexpr int pieces = head_dim / 16;  // of 16 bytes per row
  static constexpr int matrix_bytes = kTile * head_dim;
  static constexpr int bytes = 2 * matrix_bytes + 2 * kTile * 2;  // of one stage

  const unsigned char* stage;
  int num_keys;  // that exist; what lies behind them in the scales is not to be used

  __device__ Int8Tile(const unsigned char* stage, int num_keys) : stage(stage), num_keys(num_keys) {}

  // Neighbouring 32 bytes of four rows (keys), or of every other row (values), cover all banks.
  __device__ static int key(int row, int piece) {
    return row * head_dim + (piece ^ (row / (128 / head_dim) % (head_dim / 32) * 2)) * 16;
  }
  __device__ static int value(int row, int piece) {
    return matrix_bytes + row * head_dim + (piece ^ (row / 2 % (head_dim / 32) * 2)) * 16;
  }
  __device__ static int key_scale(int row) { return 2 * matrix_bytes + row * 2; }
  __device__ static int value_scale(int row) { return 2 * matrix_bytes + (kTile + row) * 2; }

  __device__ __forceinline__ void score(const Queries<head_dim>& q, int n, float (&s)[4]) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < head_dim / 32; ++c) {
      const auto* eight = stage + key(n * 8 + g, c * 2 + t / 2) + t % 2 * 8;
      const uint2 k = *reinterpret_cast<const uint2*>(eight);
      ptx::mma(s, q.whole[c][0], {first_pair(k.x), second_pair(k.x)});
      ptx::mma(s, q.whole[c][1], {first_pair(k.y), second_pair(k.y)});
    }
    const uint32_t scales = *reinterpret_cast<const uint32_t*>(stage + key_scale(n * 8 + t * 2));
    const float low = low_of(scales), high = high_of(scales);
    s[0] = __fmul_rn(s[0], low);
    s[1] = __fmul_rn(s[1], high);
    s[2] = __fmul_rn(s[2], low);
    s[3] = __fmul_rn(s[3], high);
  }

  static constexpr bool has_scales = true;
  __device__ __forceinline__ float2 value_scales(int n) const {
    const int row = n * 8 + threadIdx.x % 4 * 2;
    const uint32_t scales = *reinterpret_cast<const uint32_t*>(stage + value_scale(row));
    return make_float2(row < num_keys ? low_of(scales) : 0, row + 1 < num_keys ? high_of(scales) : 0);
  }

  // out[4 c + j] are columns 32 c + 4 i + j, i = 0..7: a lane has i = 2 t and the next.
  __device__ __forceinline__ void add_values(const uint32_t (&p)[4], int k,
                                             float (&out)[head_dim / 8][4]) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, row = k * 16 + t * 2;
#pragma unroll
    for (int c = 0; c < head_dim / 32; ++c) {
      const auto word = [&](int of) {
        return *reinterpret_cast<const uint32_t*>(stage + value(of, c * 2 + g / 4) + g % 4 * 4);
      };
      const uint32_t a = word(row), b = word(row + 1), d = word(row + 8), e = word(row + 9);
      ptx::mma(out[c * 4], p, {pair_of<0>(a, b), pair_of<0>(d, e)});
      ptx::mma(out[c * 4 + 1], p, {pair_of<1>(a, b), pair_of<1>(d, e)});
      ptx::mma(out[c * 4 + 2], p, {pair_of<2>(a, b), pair_of<2>(d, e)});
      ptx::mma(out[c * 4 + 3], p, {pair_of<3>(a, b), pair_of<3>(d, e)});
    }
  }

  // A lane's eight neighbouring columns of each 32.
  __device__ static void store(const float (&v)[head_dim / 8][2], float factor, bf16* row) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < head_dim / 32; ++c) {
      Eight eight;
#pragma unroll
      for (int e = 0; e < 8; ++e) eight.value[e] = v[c * 4 + e % 4][e / 4] * factor;
      store_eight(row + c * 32 + t * 8, eight);
    }
  }
  __device__ static void store(const float (&v)[head_dim / 8][2], float* row) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < head_dim / 32; ++c) {
#pragma unroll
      for (int e = 0; e < 8; e += 2) {  // a row of partial results is 8-byte aligned only
        *reinterpret_cast<float2*>(row + c * 32 + t * 8 + e) =
            make_float2(v[c * 4 + e % 4][e / 4], v[c * 4 + e % 4 + 1][e / 4]);
      }
    }
  }

 private:
  // Bytes 0 and 1, or 2 and 3, as two bf16.
  __device__ __forceinline__ static uint32_t first_pair(uint32_t word) {
    return int8_pair(__byte_perm(word, 0, 0x0100));
  }
  __device__ __forceinline__ static uint32_t second_pair(uint32_t word) {
    return int8_pair(__byte_perm(word, 0, 0x0302));
  }
  // Byte j of two keys.
  template <int j>
  __device__ __forceinline__ static uint32_t pair_of(uint32_t key, uint32_t next) {
    return int8_pair(__byte_perm(key, next, (4 + j) << 8 | j));
  }
};

}  // namespace octet::gpu

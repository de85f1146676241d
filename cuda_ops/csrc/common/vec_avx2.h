// common/vec_avx2.h   F32x16 in two 256-bit registers. See vec.h.

#pragma once

#include <immintrin.h>

namespace octet {

struct F32x16 {
  __m256 lo, hi;
};

// Register tile of a matrix product: 12 of 16 registers hold sums.
constexpr int kTileRows = 3, kTileCols = 2;

inline F32x16 zeros() {
  return {_mm256_setzero_ps(), _mm256_setzero_ps()};
}
inline F32x16 broadcast(float x) {
  return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}

inline __m256 widen(__m128i bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
}
inline __m256 widen_int8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}

inline F32x16 load(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
inline F32x16 load(const BF16* p) {
  return {widen(_mm_loadu_si128((const __m128i*)p)), widen(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline F32x16 load(const int8_t* p) {
  return {widen_int8(p), widen_int8(p + 8)};
}

// The first n < 16 lanes; the others are zero and their memory is not touched.
template <class T>
F32x16 load_first(const T* p, int64_t n) {
  T lanes[16] = {};
  std::memcpy(lanes, p, size_t(n) * sizeof(T));
  return load(lanes);
}

// Sixteen table entries chosen by sixteen nibbles in 8 bytes, low nibble first.
inline __m256 look_up(__m256i nibbles, F32x16 table) {
  const __m256 low = _mm256_permutevar8x32_ps(table.lo, nibbles);
  const __m256 high = _mm256_permutevar8x32_ps(table.hi, nibbles);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(nibbles, 28)));
}
inline F32x16 load_nibbles(const uint8_t* p, F32x16 table) {
  uint32_t words[2];
  std::memcpy(words, p, 8);
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  return {look_up(_mm256_srlv_epi32(_mm256_set1_epi32(int(words[0])), shifts), table),
          look_up(_mm256_srlv_epi32(_mm256_set1_epi32(int(words[1])), shifts), table)};
}

inline __m128i narrow(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 is_nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i chosen = _mm256_srli_epi32(
      _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), is_nan)),
      16);
  return _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
}

inline void store(float* p, F32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store(BF16* p, F32x16 a) {
  _mm_storeu_si128((__m128i*)p, narrow(a.lo));
  _mm_storeu_si128((__m128i*)(p + 8), narrow(a.hi));
}
template <class T>
void store_first(T* p, F32x16 a, int64_t n) {
  T lanes[16];
  store(lanes, a);
  std::memcpy(p, lanes, size_t(n) * sizeof(T));
}

inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F32x16 operator+(F32x16 a, F32x16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline F32x16 operator-(F32x16 a, F32x16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline F32x16 operator/(F32x16 a, F32x16 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}

// b where either is NaN.
inline F32x16 max(F32x16 a, F32x16 b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}

// a < b ? x : y, lane by lane.
inline F32x16 select_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}

inline F32x16 round(F32x16 a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}

// 2^n for integer-valued n in [-126, 127].
inline __m256 pow2(__m256 n) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline F32x16 pow2(F32x16 n) {
  return {pow2(n.lo), pow2(n.hi)};
}

// Lanes 8 apart first, then 4, 2, 1.
inline float sum(F32x16 a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lane(F32x16 a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline __m256 turn_pairs(__m256 x, __m256 cos_sin) {
  return _mm256_addsub_ps(_mm256_mul_ps(x, _mm256_moveldup_ps(cos_sin)),
                          _mm256_mul_ps(_mm256_permute_ps(x, 0xb1), _mm256_movehdup_ps(cos_sin)));
}
// (a, b) of each two lanes -> (a c - b s, b c + a s), where the lanes of `cos_sin` are (c, s).
inline F32x16 turn_pairs(F32x16 x, F32x16 cos_sin) {
  return {turn_pairs(x.lo, cos_sin.lo), turn_pairs(x.hi, cos_sin.hi)};
}

// Eight rows of eight.
inline void transpose(__m256* rows[8]) {
  __m256 a[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256 lo01 = _mm256_unpacklo_ps(*rows[i], *rows[i + 1]);
    const __m256 hi01 = _mm256_unpackhi_ps(*rows[i], *rows[i + 1]);
    const __m256 lo23 = _mm256_unpacklo_ps(*rows[i + 2], *rows[i + 3]);
    const __m256 hi23 = _mm256_unpackhi_ps(*rows[i + 2], *rows[i + 3]);
    a[i] = _mm256_shuffle_ps(lo01, lo23, 0x44);
    a[i + 1] = _mm256_shuffle_ps(lo01, lo23, 0xee);
    a[i + 2] = _mm256_shuffle_ps(hi01, hi23, 0x44);
    a[i + 3] = _mm256_shuffle_ps(hi01, hi23, 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    *rows[c] = _mm256_permute2f128_ps(a[c], a[4 + c], 0x20);
    *rows[4 + c] = _mm256_permute2f128_ps(a[c], a[4 + c], 0x31);
  }
}

// rows[i] lane j <-> rows[j] lane i.
inline void transpose(F32x16 (&rows)[16]) {
  __m256 *lo_lo[8], *lo_hi[8], *hi_lo[8], *hi_hi[8];
  for (int i = 0; i < 8; ++i) {
    lo_lo[i] = &rows[i].lo;
    lo_hi[i] = &rows[i].hi;
    hi_lo[i] = &rows[8 + i].lo;
    hi_hi[i] = &rows[8 + i].hi;
  }
  transpose(lo_lo);
  transpose(lo_hi);
  transpose(hi_lo);
  transpose(hi_hi);
  for (int i = 0; i < 8; ++i) {
    const __m256 corner = rows[i].hi;
    rows[i].hi = rows[8 + i].lo;
    rows[8 + i].lo = corner;
  }
}

}  // namespace octet

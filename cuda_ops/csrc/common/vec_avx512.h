// common/vec_avx512.h   F32x16 in one 512-bit register. See vec.h.

#pragma once

#include <immintrin.h>

namespace octet {

struct F32x16 {
  __m512 v;
};

// Register tile of a matrix product: kTileRows activations by kTileCols weight rows, 24 of 32 registers.
constexpr int kTileRows = 6, kTileCols = 4;

inline F32x16 zeros() {
  return {_mm512_setzero_ps()};
}
inline F32x16 broadcast(float x) {
  return {_mm512_set1_ps(x)};
}

inline __mmask16 first_lanes(int64_t n) {
  return __mmask16((1u << n) - 1u);
}
inline F32x16 widen(__m256i bf16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16))};
}

inline F32x16 load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
inline F32x16 load(const BF16* p) {
  return widen(_mm256_loadu_si256((const __m256i*)p));
}
inline F32x16 load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}

// The first n < 16 lanes; the others are zero and their memory is not touched.
inline F32x16 load_first(const float* p, int64_t n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
inline F32x16 load_first(const BF16* p, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
inline F32x16 load_first(const int8_t* p, int64_t n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)))};
}

// Sixteen table entries chosen by sixteen nibbles in 8 bytes, low nibble first.
inline F32x16 load_nibbles(const uint8_t* p, F32x16 table) {
  const __m512i words = _mm512_castsi256_si512(_mm256_castsi128_si256(_mm_loadl_epi64((const __m128i*)p)));
  const __m512i spread =
      _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), words);
  const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  return {_mm512_permutexvar_ps(_mm512_srlv_epi32(spread, shifts), table.v)};
}

inline __m256i narrow(F32x16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16));
}

inline void store(float* p, F32x16 a) {
  _mm512_storeu_ps(p, a.v);
}
inline void store(BF16* p, F32x16 a) {
  _mm256_storeu_si256((__m256i*)p, narrow(a));
}
inline void store_first(float* p, F32x16 a, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), a.v);
}
inline void store_first(BF16* p, F32x16 a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(a));
}

inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline F32x16 operator+(F32x16 a, F32x16 b) {
  return {_mm512_add_ps(a.v, b.v)};
}
inline F32x16 operator-(F32x16 a, F32x16 b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
inline F32x16 operator/(F32x16 a, F32x16 b) {
  return {_mm512_div_ps(a.v, b.v)};
}

// b where either is NaN.
inline F32x16 max(F32x16 a, F32x16 b) {
  return {_mm512_max_ps(a.v, b.v)};
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return {_mm512_min_ps(a.v, b.v)};
}

// a < b ? x : y, lane by lane.
inline F32x16 select_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}

inline F32x16 round(F32x16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)};
}

// 2^n for integer-valued n in [-126, 127].
inline F32x16 pow2(F32x16 n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}

// Lanes 8 apart first, then 4, 2, 1.
inline float sum(F32x16 a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lane(F32x16 a) {
  return _mm512_reduce_max_ps(a.v);
}

// (a, b) of each two lanes -> (a c - b s, b c + a s), where the lanes of `cos_sin` are (c, s).
inline F32x16 turn_pairs(F32x16 x, F32x16 cos_sin) {
  const __m512 cosines = _mm512_mul_ps(x.v, _mm512_moveldup_ps(cos_sin.v));
  const __m512 sines = _mm512_mul_ps(_mm512_permute_ps(x.v, 0xb1), _mm512_movehdup_ps(cos_sin.v));
  return {_mm512_mask_sub_ps(_mm512_add_ps(cosines, sines), 0x5555, cosines, sines)};
}

// rows[i] lane j <-> rows[j] lane i.
inline void transpose(F32x16 (&rows)[16]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512 lo01 = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    const __m512 hi01 = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    const __m512 lo23 = _mm512_unpacklo_ps(rows[i + 2].v, rows[i + 3].v);
    const __m512 hi23 = _mm512_unpackhi_ps(rows[i + 2].v, rows[i + 3].v);
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(lo01), _mm512_castps_pd(lo23)));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(lo01), _mm512_castps_pd(lo23)));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(hi01), _mm512_castps_pd(hi23)));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(hi01), _mm512_castps_pd(hi23)));
  }
  // a[4 r + c] holds rows 4 r .. 4 r + 3 of columns c, c + 4, c + 8, c + 12, one per 128-bit quarter.
  for (int c = 0; c < 4; ++c) {
    b[c] = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);
    b[4 + c] = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    b[8 + c] = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    b[12 + c] = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
  }
  for (int c = 0; c < 4; ++c) {
    rows[c].v = _mm512_shuffle_f32x4(b[c], b[8 + c], 0x88);
    rows[8 + c].v = _mm512_shuffle_f32x4(b[c], b[8 + c], 0xdd);
    rows[4 + c].v = _mm512_shuffle_f32x4(b[4 + c], b[12 + c], 0x88);
    rows[12 + c].v = _mm512_shuffle_f32x4(b[4 + c], b[12 + c], 0xdd);
  }
}

}  // namespace octet

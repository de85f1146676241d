// common/vec_int8.h   Sixteen 32-bit sums of products of bytes, the same at every instruction set.
//
// dot4 adds four products to each lane: unsigned bytes of the lane (weights, offset to be unsigned) times
// four signed bytes that all lanes share (one row of activations). Every body is exact: the sums are
// integers.
//
//   AVX-512 VNNI   vpdpbusd
//   AVX2           even and odd bytes widened to 16 bits, vpmaddwd (vpmaddubsw would saturate)
//   otherwise      plain C++

#pragma once

#include <cstring>

#include "vec.h"

namespace octet {

#if defined(__AVX512F__) && defined(__AVX512VNNI__)

struct I32x16 {
  __m512i v;
};
struct Bytes64 {
  __m512i v;
};
struct Bytes4 {
  __m512i v;
};

inline I32x16 broadcast_int(int32_t x) {
  return {_mm512_set1_epi32(x)};
}
inline Bytes64 load_bytes(const uint8_t* p) {
  return {_mm512_load_si512(p)};
}
inline Bytes4 load_four(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return {_mm512_set1_epi32(four)};
}
inline I32x16 dot4(I32x16 sums, Bytes64 weights, Bytes4 x) {
  // Not the intrinsic: GCC 12 copies every sum twice around it, which halves the rate of a register tile.
  asm("vpdpbusd %2, %1, %0" : "+v"(sums.v) : "v"(weights.v), "v"(x.v));
  return sums;
}
inline I32x16 operator+(I32x16 a, I32x16 b) {
  return {_mm512_add_epi32(a.v, b.v)};
}
inline F32x16 to_float(I32x16 a) {
  return {_mm512_cvtepi32_ps(a.v)};
}

#elif defined(__AVX2__) && defined(__FMA__)

struct I32x16 {
  __m256i lo, hi;
};
struct Bytes64 {
  __m256i even[2], odd[2];  // 16-bit
};
struct Bytes4 {
  __m256i even, odd;
};

inline I32x16 broadcast_int(int32_t x) {
  return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
inline Bytes64 load_bytes(const uint8_t* p) {
  Bytes64 out;
  for (int i = 0; i < 2; ++i) {
    const __m256i bytes = _mm256_loadu_si256((const __m256i*)(p + 32 * i));
    out.even[i] = _mm256_and_si256(bytes, _mm256_set1_epi16(0xff));
    out.odd[i] = _mm256_srli_epi16(bytes, 8);
  }
  return out;
}
inline Bytes4 load_four(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  const __m256i bytes = _mm256_set1_epi32(four);
  return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}
inline __m256i dot4(__m256i sums, __m256i even, __m256i odd, const Bytes4& x) {
  return _mm256_add_epi32(sums,
                          _mm256_add_epi32(_mm256_madd_epi16(even, x.even), _mm256_madd_epi16(odd, x.odd)));
}
inline I32x16 dot4(I32x16 sums, const Bytes64& weights, const Bytes4& x) {
  return {dot4(sums.lo, weights.even[0], weights.odd[0], x),
          dot4(sums.hi, weights.even[1], weights.odd[1], x)};
}
inline F32x16 to_float(I32x16 a) {
#if defined(__AVX512F__)  // AVX-512 without VNNI
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_cvtepi32_ps(a.lo)), _mm256_cvtepi32_ps(a.hi), 1)};
#else
  return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
#endif
}

#else

struct I32x16 {
  int32_t lane[16];
};
struct Bytes64 {
  const uint8_t* p;
};
struct Bytes4 {
  int8_t byte[4];
};

inline I32x16 broadcast_int(int32_t x) {
  I32x16 out;
  for (int32_t& lane : out.lane) lane = x;
  return out;
}
inline Bytes64 load_bytes(const uint8_t* p) {
  return {p};
}
inline Bytes4 load_four(const int8_t* p) {
  return {{p[0], p[1], p[2], p[3]}};
}
inline I32x16 dot4(I32x16 sums, Bytes64 weights, Bytes4 x) {
  for (int i = 0; i < 16; ++i) {
    for (int b = 0; b < 4; ++b) sums.lane[i] += int32_t(weights.p[4 * i + b]) * x.byte[b];
  }
  return sums;
}
inline F32x16 to_float(const I32x16& a) {
  return by_lane([&](int i) { return float(a.lane[i]); });
}

#endif

}  // namespace octet

// common/vec_int8.h   Sixteen 32-bit sums of products of bytes, the same at every instruction set.
//
// dot4 adds four products to each lane: unsigned bytes of the lane (weights, offset to be unsigned) times
// four signed numbers that all lanes share (one row of activations). Every body is exact: the sums are
// integers. split_nibbles takes 64 bytes of two nibbles each, low ones and high ones apart.
//
//   AVX-512 VNNI   vpdpbusd, and AVX-VNNI the same in halves
//   AVX2           bytes: the even and the odd ones widened to 16 bits, vpmaddwd (vpmaddubsw would saturate)
//                  nibbles: vpmaddubsw, its 16-bit pairs added up for kMostNibbleDots dots at a time
//   otherwise      plain C++
//
// Rows of activations hold int8 for nibbles and ByteElement for bytes, which AVX2 wants in 16 bits and in the
// order 0 2 1 3. NibbleSums are what dots with nibbles add to: they start at, or are added to, 32-bit sums.
//
// store_int8, store_elements and store_nibbles narrow sixteen floats that are small integers.

#pragma once

#include <cstring>

#include "vec.h"

namespace octet {

#if defined(__AVX512F__) && defined(__AVX512VNNI__)

constexpr int kDotLatency = 4;  // cycles; as many sums in flight hide it
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
  return {_mm512_loadu_si512(p)};
}
inline void split_nibbles(const uint8_t* p, Bytes64& low, Bytes64& high) {
  const __m512i both = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
  low.v = _mm512_and_si512(both, mask);
  high.v = _mm512_and_si512(_mm512_srli_epi32(both, 4), mask);
}
inline void store_bytes(uint8_t* p, Bytes64 bytes) {
  _mm512_storeu_si512(p, bytes.v);
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
  __m256i half[2];
};
struct Bytes4 {
  __m256i v;
};

inline I32x16 broadcast_int(int32_t x) {
  return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
inline Bytes64 load_bytes(const uint8_t* p) {
  return {{_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))}};
}
inline void split_nibbles(const uint8_t* p, Bytes64& low, Bytes64& high) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (int i = 0; i < 2; ++i) {
    const __m256i both = _mm256_loadu_si256((const __m256i*)(p + 32 * i));
    low.half[i] = _mm256_and_si256(both, mask);
    high.half[i] = _mm256_and_si256(_mm256_srli_epi32(both, 4), mask);
  }
}
inline void store_bytes(uint8_t* p, const Bytes64& bytes) {
  for (int i = 0; i < 2; ++i) _mm256_storeu_si256((__m256i*)(p + 32 * i), bytes.half[i]);
}
inline Bytes4 load_four(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return {_mm256_set1_epi32(four)};
}
inline I32x16 operator+(I32x16 a, I32x16 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline F32x16 to_float(I32x16 a) {
#if defined(__AVX512F__)  // AVX-512 without VNNI
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_cvtepi32_ps(a.lo)), _mm256_cvtepi32_ps(a.hi), 1)};
#else
  return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
#endif
}

#if defined(__AVXVNNI__)
constexpr int kDotLatency = 4;
inline I32x16 dot4(I32x16 sums, const Bytes64& weights, Bytes4 x) {
  return {_mm256_dpbusd_avx_epi32(sums.lo, weights.half[0], x.v),
          _mm256_dpbusd_avx_epi32(sums.hi, weights.half[1], x.v)};
}
#else
#define OCTET_SUMS_OF_NIBBLES_ARE_SHORT
constexpr int kDotLatency = 1;
using ByteElement = int16_t;
struct Words4 {
  __m256i even, odd;
};
struct NibbleSums {
  __m256i lo, hi;  // 16-bit, two to a lane
};
constexpr int kMostNibbleDots = 8;  // 8 * 2 * 15 * 127 < 2^15
inline Words4 load_four(const int16_t* p) {
  int32_t even, odd;
  std::memcpy(&even, p, 4);
  std::memcpy(&odd, p + 2, 4);
  return {_mm256_set1_epi32(even), _mm256_set1_epi32(odd)};
}
// Not the intrinsics: GCC 12 reorders whole chains of their sums and keeps every product until the end.
inline void add_words(__m256i& sums, __m256i products) {
  asm("vpaddw %1, %0, %0" : "+x"(sums) : "x"(products));
}
inline void add_ints(__m256i& sums, __m256i products) {
  asm("vpaddd %1, %0, %0" : "+x"(sums) : "x"(products));
}
inline I32x16 dot4(I32x16 sums, const Bytes64& weights, const Words4& x) {
  const __m256i is_even = _mm256_set1_epi16(0xff);
  add_ints(sums.lo, _mm256_madd_epi16(_mm256_and_si256(weights.half[0], is_even), x.even));
  add_ints(sums.lo, _mm256_madd_epi16(_mm256_srli_epi16(weights.half[0], 8), x.odd));
  add_ints(sums.hi, _mm256_madd_epi16(_mm256_and_si256(weights.half[1], is_even), x.even));
  add_ints(sums.hi, _mm256_madd_epi16(_mm256_srli_epi16(weights.half[1], 8), x.odd));
  return sums;
}
inline NibbleSums dot4(NibbleSums sums, const Bytes64& weights, Bytes4 x) {
  add_words(sums.lo, _mm256_maddubs_epi16(weights.half[0], x.v));
  add_words(sums.hi, _mm256_maddubs_epi16(weights.half[1], x.v));
  return sums;
}
inline void begin_sums(NibbleSums& sums, I32x16) {
  sums = {_mm256_setzero_si256(), _mm256_setzero_si256()};
}
inline I32x16 end_sums(NibbleSums sums, I32x16 so_far) {
  const __m256i ones = _mm256_set1_epi16(1);
  return so_far + I32x16{_mm256_madd_epi16(sums.lo, ones), _mm256_madd_epi16(sums.hi, ones)};
}
#endif

#else

constexpr int kDotLatency = 1;
struct I32x16 {
  int32_t lane[16];
};
struct Bytes64 {
  uint8_t byte[64];
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
  Bytes64 out;
  std::memcpy(out.byte, p, 64);
  return out;
}
inline void split_nibbles(const uint8_t* p, Bytes64& low, Bytes64& high) {
  for (int i = 0; i < 64; ++i) {
    low.byte[i] = p[i] & 15;
    high.byte[i] = p[i] >> 4;
  }
}
inline void store_bytes(uint8_t* p, const Bytes64& bytes) {
  std::memcpy(p, bytes.byte, 64);
}
inline Bytes4 load_four(const int8_t* p) {
  return {{p[0], p[1], p[2], p[3]}};
}
inline I32x16 dot4(I32x16 sums, const Bytes64& weights, Bytes4 x) {
  for (int i = 0; i < 16; ++i) {
    for (int b = 0; b < 4; ++b) sums.lane[i] += int32_t(weights.byte[4 * i + b]) * x.byte[b];
  }
  return sums;
}
inline I32x16 operator+(I32x16 a, const I32x16& b) {
  for (int i = 0; i < 16; ++i) a.lane[i] += b.lane[i];
  return a;
}
inline F32x16 to_float(const I32x16& a) {
  return by_lane([&](int i) { return float(a.lane[i]); });
}

#endif

#if !defined(OCTET_SUMS_OF_NIBBLES_ARE_SHORT)
using ByteElement = int8_t;
using NibbleSums = I32x16;
constexpr int kMostNibbleDots = 1 << 16;
#endif

// Sums that go on from `so_far`, and what they have come to.
inline void begin_sums(I32x16& sums, I32x16 so_far) {
  sums = so_far;
}
inline I32x16 end_sums(I32x16 sums, I32x16) {
  return sums;
}

#if defined(__AVX512F__)
inline void store_int8(int8_t* p, F32x16 a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
inline __m256i to_words(F32x16 a) {
  return _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a.v));
}
#elif defined(__AVX2__)
inline __m256i to_words(F32x16 a) {
  const __m256i mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
  return _mm256_permute4x64_epi64(mixed, 0xd8);
}
inline void store_int8(int8_t* p, F32x16 a) {
  const __m256i words = to_words(a);
  _mm_storeu_si128((__m128i*)p,
                   _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
#else
inline void store_int8(int8_t* p, F32x16 a) {
  float lanes[16];
  store(lanes, a);
  for (int i = 0; i < 16; ++i) p[i] = int8_t(int32_t(lanes[i]));
}
#endif

// Sixteen columns of a row, as dot4 wants them.
inline void store_elements(int8_t* p, F32x16 a) {
  store_int8(p, a);
}
#if defined(__AVX2__)
inline void store_elements(int16_t* p, F32x16 a) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,  //
                                         0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  _mm256_storeu_si256((__m256i*)p, _mm256_shuffle_epi8(to_words(a), order));
}
#endif

// Eight bytes of two nibbles each, the low one first, of integers in [-8, 7].
inline void store_nibbles(uint8_t* p, F32x16 a) {
  int8_t bytes[16];
  store_int8(bytes, a);
#if defined(__SSSE3__)
  const __m128i nibbles = _mm_and_si128(_mm_loadu_si128((const __m128i*)bytes), _mm_set1_epi8(15));
  const __m128i pairs = _mm_maddubs_epi16(nibbles, _mm_set1_epi16(0x1001));  // low + 16 * high
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(pairs, pairs));
#else
  for (int i = 0; i < 8; ++i) p[i] = uint8_t((bytes[2 * i] & 15) | (bytes[2 * i + 1] & 15) << 4);
#endif
}

// Each 8 of 16 bytes in the order 0 2 4 6 1 3 5 7.
inline void evens_first(int8_t* p) {
#if defined(__SSSE3__)
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  _mm_storeu_si128((__m128i*)p, _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)p), order));
#else
  int8_t from[16];
  std::memcpy(from, p, 16);
  for (int i = 0; i < 16; ++i) p[i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = from[i];
#endif
}

}  // namespace octet

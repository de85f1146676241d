// common/philox.h   Random bits that are a function of (key, counter): Philox4x32-10, of several counters.
//
// Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". No state, so a token's noise does not
// depend on which tokens were sampled before it or beside it.
//
// A PhiloxLanes holds a 32-bit word of each of kFours counters in the low halves of 64-bit lanes; what is in
// the high halves is never looked at, so that a product needs no shuffle.

#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace octet {

#if defined(__AVX512F__)

struct PhiloxLanes {
  static constexpr int kFours = 8;
  __m512i v;
};
inline PhiloxLanes philox_lanes(uint32_t x) {
  return {_mm512_set1_epi64(x)};
}
// first, first + 1, ... in the order that store_fours wants.
inline PhiloxLanes philox_counters(uint32_t first) {
  const __m512i steps = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  return {_mm512_add_epi32(_mm512_set1_epi64(first), steps)};
}
inline PhiloxLanes product(PhiloxLanes a, PhiloxLanes b) {
  return {_mm512_mul_epu32(a.v, b.v)};
}
inline PhiloxLanes high_word(PhiloxLanes a) {
  return {_mm512_srli_epi64(a.v, 32)};
}
inline PhiloxLanes exclusive_or(PhiloxLanes a, PhiloxLanes b, PhiloxLanes c) {
  return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)};
}
inline __m512i join(PhiloxLanes low, PhiloxLanes high) {
  return _mm512_mask_shuffle_epi32(low.v, 0xaaaa, high.v, _MM_PERM_CCAA);
}
// words[4 * four + w] = word w of the counter `first + four`.
inline void store_fours(const PhiloxLanes (&c)[4], uint32_t* words) {
  const __m512i a = join(c[0], c[1]), b = join(c[2], c[3]);
  _mm512_storeu_si512(words, _mm512_unpacklo_epi64(a, b));
  _mm512_storeu_si512(words + 16, _mm512_unpackhi_epi64(a, b));
}

#elif defined(__AVX2__)

struct PhiloxLanes {
  static constexpr int kFours = 4;
  __m256i v;
};
inline PhiloxLanes philox_lanes(uint32_t x) {
  return {_mm256_set1_epi64x(x)};
}
inline PhiloxLanes philox_counters(uint32_t first) {
  return {_mm256_add_epi32(_mm256_set1_epi64x(first), _mm256_setr_epi64x(0, 2, 1, 3))};
}
inline PhiloxLanes product(PhiloxLanes a, PhiloxLanes b) {
  return {_mm256_mul_epu32(a.v, b.v)};
}
inline PhiloxLanes high_word(PhiloxLanes a) {
  return {_mm256_srli_epi64(a.v, 32)};
}
inline PhiloxLanes exclusive_or(PhiloxLanes a, PhiloxLanes b, PhiloxLanes c) {
  return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v)};
}
inline __m256i join(PhiloxLanes low, PhiloxLanes high) {
  return _mm256_blend_epi32(low.v, _mm256_slli_epi64(high.v, 32), 0xaa);
}
inline void store_fours(const PhiloxLanes (&c)[4], uint32_t* words) {
  const __m256i a = join(c[0], c[1]), b = join(c[2], c[3]);
  _mm256_storeu_si256((__m256i*)words, _mm256_unpacklo_epi64(a, b));
  _mm256_storeu_si256((__m256i*)(words + 8), _mm256_unpackhi_epi64(a, b));
}

#else

struct PhiloxLanes {
  static constexpr int kFours = 1;
  uint64_t v;
};
inline PhiloxLanes philox_lanes(uint32_t x) {
  return {x};
}
inline PhiloxLanes philox_counters(uint32_t first) {
  return {first};
}
inline PhiloxLanes product(PhiloxLanes a, PhiloxLanes b) {
  return {uint64_t(uint32_t(a.v)) * uint32_t(b.v)};
}
inline PhiloxLanes high_word(PhiloxLanes a) {
  return {a.v >> 32};
}
inline PhiloxLanes exclusive_or(PhiloxLanes a, PhiloxLanes b, PhiloxLanes c) {
  return {a.v ^ b.v ^ c.v};
}
inline void store_fours(const PhiloxLanes (&c)[4], uint32_t* words) {
  for (int w = 0; w < 4; ++w) words[w] = uint32_t(c[w].v);
}

#endif

// words[4 * i + w], for i below kFours: word w of what `key` and the four words (counter low, counter high,
// first + i, 0) give.
inline void philox_fours(uint64_t key, uint64_t counter, uint32_t first, uint32_t* words) {
  PhiloxLanes c[4] = {philox_lanes(uint32_t(counter)), philox_lanes(uint32_t(counter >> 32)),
                      philox_counters(first), philox_lanes(0)};
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const PhiloxLanes a = product(c[0], philox_lanes(0xD2511F53u));
    const PhiloxLanes b = product(c[2], philox_lanes(0xCD9E8D57u));
    c[0] = exclusive_or(high_word(b), c[1], philox_lanes(k0));
    c[1] = b;
    c[2] = exclusive_or(high_word(a), c[3], philox_lanes(k1));
    c[3] = a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  store_fours(c, words);
}

}  // namespace octet

// common/bf16.h   The 16-bit brain float as bits, and its two conversions.
//
// Rounding is to nearest, ties to even, at every instruction set; NaN stays NaN.

#pragma once

#include <cstdint>
#include <cstring>

namespace octet {

struct BF16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float to_float(float value) {
  return value;
}
inline float to_float(BF16 value) {
  return float_of(uint32_t(value.bits) << 16);
}

inline BF16 to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return BF16{uint16_t((bits >> 16) | 0x0040u)};
  return BF16{uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline void assign(float& out, float value) {
  out = value;
}
inline void assign(BF16& out, float value) {
  out = to_bf16(value);
}

}  // namespace octet

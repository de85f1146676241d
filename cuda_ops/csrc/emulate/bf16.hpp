// emulate/bf16.hpp   The bf16 types and conversions of CUDA's cuda_bf16.h, as far as kernels use them
//
// Rounding is to nearest, ties to even, as on the device; arithmetic is fp32 with one rounding.
#pragma once

#include "device.hpp"

struct __nv_bfloat16 {
  unsigned short bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

EMULATE_PLAIN inline float __bfloat162float(__nv_bfloat16 value) {
  return __uint_as_float(unsigned(value.bits) << 16);
}
EMULATE_PLAIN inline __nv_bfloat16 __float2bfloat16(float value) {
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
EMULATE_PLAIN inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  return __float2bfloat16(value);
}
EMULATE_PLAIN inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16(x), __float2bfloat16(y)};
}
EMULATE_PLAIN inline float2 __bfloat1622float2(__nv_bfloat162 value) {
  return {__bfloat162float(value.x), __bfloat162float(value.y)};
}

// gpu/elements.cuh   Activation types: eight values at a time as fp32, and sums over a warp or a block
//
// Eight bf16 are one 16-byte access, eight fp32 two. Sums use the same tree whatever runs beside them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <launch.cuh>

#include "../common/status.h"

namespace octet::gpu {

using bf16 = __nv_bfloat16;

struct Eight {
  float value[8];
};

// Calls body(T{}) with the device's element type of `type`.
template <class Body>
auto with_element(DType type, Body body) {
  return type == DType::bfloat16 ? body(bf16{}) : body(float{});
}

__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ float low_of(uint32_t pair) {
  return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float high_of(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ float load_one(const float* x) {
  return *x;
}
__device__ __forceinline__ float load_one(const bf16* x) {
  return __bfloat162float(*x);
}
__device__ __forceinline__ void store_one(float* out, float value) {
  *out = value;
}
__device__ __forceinline__ void store_one(bf16* out, float value) {
  *out = __float2bfloat16(value);
}

__device__ __forceinline__ Eight load_eight(const float* x) {
  const float4 a = *reinterpret_cast<const float4*>(x), b = *reinterpret_cast<const float4*>(x + 4);
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
__device__ __forceinline__ Eight load_eight(const bf16* x) {
  const uint4 v = *reinterpret_cast<const uint4*>(x);
  return {{low_of(v.x), high_of(v.x), low_of(v.y), high_of(v.y), low_of(v.z), high_of(v.z), low_of(v.w),
           high_of(v.w)}};
}
__device__ __forceinline__ void store_eight(float* out, const Eight& v) {
  *reinterpret_cast<float4*>(out) = make_float4(v.value[0], v.value[1], v.value[2], v.value[3]);
  *reinterpret_cast<float4*>(out + 4) = make_float4(v.value[4], v.value[5], v.value[6], v.value[7]);
}
__device__ __forceinline__ void store_eight(bf16* out, const Eight& v) {
  *reinterpret_cast<uint4*>(out) =
      make_uint4(pack_bf16x2(v.value[0], v.value[1]), pack_bf16x2(v.value[2], v.value[3]),
                 pack_bf16x2(v.value[4], v.value[5]), pack_bf16x2(v.value[6], v.value[7]));
}
// The value as the type stores it: what a later kernel will read.
__device__ __forceinline__ float as_stored(float value, float) {
  return value;
}
__device__ __forceinline__ float as_stored(float value, bf16) {
  return __bfloat162float(__float2bfloat16(value));
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

// Sum over a block of `threads`, the same for every thread. May be called again at once.
template <int threads>
__device__ __forceinline__ float block_sum(float value) {
  OCTET_SHARED(float, parts, threads / 32);
  value = warp_sum(value);
  __syncthreads();  // an earlier sum's readers are done
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < threads / 32; ++warp) sum += parts[warp];
  return sum;
}

__device__ __forceinline__ float sigmoid(float x) {
  return 1.0f / (1.0f + __expf(-x));
}
__device__ __forceinline__ float silu(float x) {
  return x * sigmoid(x);
}

}  // namespace octet::gpu

// gpu/quantize.cuh   The rule by which numbers become integers with a bf16 scale (quantize.cu, rope.cu)
#pragma once

#include "elements.cuh"

namespace octet::gpu {

__device__ inline bf16 scale_for(float magnitude, float limit) {
  const bf16 scale = __float2bfloat16(magnitude / limit);
  return __bfloat162float(scale) > 0 ? scale : __float2bfloat16(1.0f);
}

__device__ inline int quantized(float w, float scale, float limit) {
  return int(fminf(fmaxf(roundf(w / scale), -limit), limit));  // roundf: halves away from zero
}

}  // namespace octet::gpu

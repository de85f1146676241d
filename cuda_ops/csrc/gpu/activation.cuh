// gpu/activation.cuh   The activations a product may end in
#pragma once

#include "../include/linear.h"
#include "elements.cuh"

namespace octet::gpu {

__device__ __forceinline__ float activated(float y, Activation activation) {
  if (activation == Activation::gelu) return 0.5f * y * (1.0f + erff(y * 0.70710678f));
  if (activation == Activation::quick_gelu) return y * sigmoid(1.702f * y);
  return y;
}

}  // namespace octet::gpu

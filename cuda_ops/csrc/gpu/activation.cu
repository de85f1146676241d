// gpu/activation.cu   What follows a bf16 product of the framework: bias and activation, in place
//
//   x[m, n] = activation(x[m, n] + bias[n])      gelu with erf, quick_gelu = y * sigmoid(1.702 y), or none
//
//   x [M, N]  read once, written once   bias [N] stays in L1, null: none
//   bytes   2 M N sizeof(T)   -> bandwidth bound
//   map     a thread per eight values
//   needs   N % 8 == 0, 16-byte aligned rows; M may be 0
//   order   no sums
//   source  Hendrycks and Gimpel 2016, arXiv:1606.08415           twin  the end of cpu/linear.cc
//   speed   not yet measured

#include "activation.cuh"
#include "elements.cuh"
#include "launchers.h"

namespace octet::gpu {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    bias_activation_kernel(T* x, const T* bias, Activation activation, int64_t num_pieces, int n) {
  const int64_t piece = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (piece >= num_pieces) return;
  Eight v = load_eight(x + piece * 8);
  Eight b = {};
  if (bias) b = load_eight(bias + piece * 8 % n);
#pragma unroll
  for (int j = 0; j < 8; ++j) v.value[j] = activated(v.value[j] + b.value[j], activation);
  store_eight(x + piece * 8, v);
}

}  // namespace

Status bias_activation(Stream stream, DType type, void* x, const void* bias, Activation activation, int64_t m,
                       int64_t n) {
  if (n % 8 != 0) return "the width of a row must be a multiple of 8";
  if (m * n == 0) return nullptr;
  return with_element(type, [&](auto t) {
    using T = decltype(t);
    return launch({"bias_activation", dim3(unsigned(ceil_div(m * n / 8, kThreads))), kThreads, 0, stream},
                  bias_activation_kernel<T>, static_cast<T*>(x), static_cast<const T*>(bias), activation,
                  m * n / 8, int(n));
  });
}

}  // namespace octet::gpu

// gpu/norms.cu   Row norms and the gated activation
//
//   rms_norm      y = x * rsqrt(mean(x^2) + eps) * w
//   add_rms_norm  r = round(r + x), y = rms_norm(r)
//   layer_norm    y = (x - mean(x)) * rsqrt(var(x) + eps) * w + b
//   silu_mul      y = silu(gate) * up, gate and up the halves of a row
//
//   x, r, y [M, H]  read from memory once (a second pass hits L1), written once     w, b [H]  stay in L2
//   bytes   2 M H sizeof(T), add_rms_norm 4 M H sizeof(T), silu_mul 3 M I sizeof(T)   -> bandwidth bound
//   map     one block of 256 threads per row, eight values per access; silu_mul: a thread per eight values
//   needs   H % 8 == 0, rows contiguous and 16-byte aligned; M may be 0
//   order   thread t sums pieces t, t + 256, ...; then the tree of block_sum: depends on H alone
//   source  Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450; Shazeer 2020,
//           arXiv:2002.05202                                     twin  cpu/norms.cc
//   speed   not yet measured

#include "elements.cuh"
#include "launchers.h"

namespace octet::gpu {
namespace {

constexpr int kThreads = 256;
constexpr const char* kOddRow = "the width of a row must be a multiple of 8";

// Writes y from a row whose squares this thread has summed to `squares`.
template <class T>
__device__ void scale_row(const T* row, float squares, const T* weight, float eps, T* out, int h) {
  const float scale = rsqrtf(block_sum<kThreads>(squares) / float(h) + eps);
  for (int i = threadIdx.x * 8; i < h; i += kThreads * 8) {
    Eight v = load_eight(row + i);
    const Eight w = load_eight(weight + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) v.value[j] = v.value[j] * scale * w.value[j];
    store_eight(out + i, v);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const T* x, const T* weight, float eps, T* out, int h) {
  const T* row = x + int64_t(blockIdx.x) * h;
  float squares = 0;
  for (int i = threadIdx.x * 8; i < h; i += kThreads * 8) {
    const Eight v = load_eight(row + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += v.value[j] * v.value[j];
  }
  scale_row(row, squares, weight, eps, out + int64_t(blockIdx.x) * h, h);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_rms_norm_kernel(const T* x, T* residual, const T* weight, float eps, T* out, int h) {
  x += int64_t(blockIdx.x) * h;
  residual += int64_t(blockIdx.x) * h;
  float squares = 0;
  for (int i = threadIdx.x * 8; i < h; i += kThreads * 8) {
    const Eight a = load_eight(x + i);
    Eight r = load_eight(residual + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      r.value[j] = as_stored(r.value[j] + a.value[j], T{});
      squares += r.value[j] * r.value[j];
    }
    store_eight(residual + i, r);  // each thread reads back only what it wrote itself
  }
  scale_row(residual, squares, weight, eps, out + int64_t(blockIdx.x) * h, h);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    layer_norm_kernel(const T* x, const T* weight, const T* bias, float eps, T* out, int h) {
  x += int64_t(blockIdx.x) * h;
  out += int64_t(blockIdx.x) * h;
  float sum = 0;
  for (int i = threadIdx.x * 8; i < h; i += kThreads * 8) {
    const Eight v = load_eight(x + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += v.value[j];
  }
  const float mean = block_sum<kThreads>(sum) / float(h);
  float squares = 0;
  for (int i = threadIdx.x * 8; i < h; i += kThreads * 8) {
    const Eight v = load_eight(x + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += (v.value[j] - mean) * (v.value[j] - mean);
  }
  const float scale = rsqrtf(block_sum<kThreads>(squares) / float(h) + eps);
  for (int i = threadIdx.x * 8; i < h; i += kThreads * 8) {
    Eight v = load_eight(x + i);
    const Eight w = load_eight(weight + i), b = load_eight(bias + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) v.value[j] = (v.value[j] - mean) * scale * w.value[j] + b.value[j];
    store_eight(out + i, v);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    silu_mul_kernel(const T* gate_up, T* out, int64_t num_pieces, int width) {
  const int64_t piece = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (piece >= num_pieces) return;
  const int64_t row = piece * 8 / width, column = piece * 8 % width;
  const T* gate = gate_up + row * 2 * width + column;
  Eight g = load_eight(gate);
  const Eight u = load_eight(gate + width);
#pragma unroll
  for (int j = 0; j < 8; ++j) g.value[j] = silu(g.value[j]) * u.value[j];
  store_eight(out + row * width + column, g);
}

}  // namespace

Status rms_norm(Stream stream, DType type, const void* x, const void* weight, float eps, void* out, int64_t m,
                int64_t h) {
  if (h % 8 != 0) return kOddRow;
  if (m == 0) return nullptr;
  return with_element(type, [&](auto t) {
    using T = decltype(t);
    return launch({"rms_norm", dim3(unsigned(m)), kThreads, 0, stream}, rms_norm_kernel<T>,
                  static_cast<const T*>(x), static_cast<const T*>(weight), eps, static_cast<T*>(out), int(h));
  });
}

Status add_rms_norm(Stream stream, DType type, const void* x, void* residual, const void* weight, float eps,
                    void* out, int64_t m, int64_t h) {
  if (h % 8 != 0) return kOddRow;
  if (m == 0) return nullptr;
  return with_element(type, [&](auto t) {
    using T = decltype(t);
    return launch({"add_rms_norm", dim3(unsigned(m)), kThreads, 0, stream}, add_rms_norm_kernel<T>,
                  static_cast<const T*>(x), static_cast<T*>(residual), static_cast<const T*>(weight), eps,
                  static_cast<T*>(out), int(h));
  });
}

Status layer_norm(Stream stream, DType type, const void* x, const void* weight, const void* bias, float eps,
                  void* out, int64_t m, int64_t h) {
  if (h % 8 != 0) return kOddRow;
  if (m == 0) return nullptr;
  return with_element(type, [&](auto t) {
    using T = decltype(t);
    return launch({"layer_norm", dim3(unsigned(m)), kThreads, 0, stream}, layer_norm_kernel<T>,
                  static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(bias), eps,
                  static_cast<T*>(out), int(h));
  });
}

Status silu_mul(Stream stream, DType type, const void* gate_up, void* out, int64_t m, int64_t width) {
  if (width % 8 != 0) return kOddRow;
  const int64_t num_pieces = m * width / 8;
  if (num_pieces == 0) return nullptr;
  return with_element(type, [&](auto t) {
    using T = decltype(t);
    return launch({"silu_mul", dim3(unsigned(ceil_div(num_pieces, kThreads))), kThreads, 0, stream},
                  silu_mul_kernel<T>, static_cast<const T*>(gate_up), static_cast<T*>(out), num_pieces,
                  int(width));
  });
}

}  // namespace octet::gpu

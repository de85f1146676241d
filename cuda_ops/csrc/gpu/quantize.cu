// gpu/quantize.cu   Symmetric weight quantisation
//
//   scale = bf16(max|w| / limit), 1 for all zeros; q = clip(round_half_away(w / scale), -limit, limit)
//   int8: one scale per row, limit 127      int4: one scale per `group` columns of a row, limit 7
//
//   weight [N, K] fp32 or bf16   data [N, K] int8 or [N, K / 2], low nibble = even column   scales bf16
//
//   bytes   the weight once (int8: a second time from cache), the result once   -> bandwidth bound
//   map     int8: a block per row; int4: a warp per group, grid over all groups
//   needs   group even and a divisor of K; N may be 0
//   order   maxima only, so results are the twin's to the bit
//   source  the model's quantisation rules                        twin  cpu/quantize.cc
//   speed   not yet measured

#include "launchers.h"
#include "quantize.cuh"

namespace octet::gpu {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_int8_kernel(const T* weight, int8_t* data, bf16* scales, int64_t k) {
  OCTET_SHARED(float, parts, kThreads / 32);
  const T* row = weight + int64_t(blockIdx.x) * k;
  float largest = 0;
  for (int64_t i = threadIdx.x; i < k; i += kThreads) largest = fmaxf(largest, fabsf(load_one(row + i)));
  largest = warp_max(largest);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int warp = 0; warp < kThreads / 32; ++warp) largest = fmaxf(largest, parts[warp]);
  const bf16 stored = scale_for(largest, 127);
  const float scale = __bfloat162float(stored);
  if (threadIdx.x == 0) scales[blockIdx.x] = stored;
  for (int64_t i = threadIdx.x; i < k; i += kThreads) {
    data[int64_t(blockIdx.x) * k + i] = int8_t(quantized(load_one(row + i), scale, 127));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_int4_kernel(const T* weight, int group, uint8_t* data, bf16* scales, int64_t num_groups) {
  const int lane = threadIdx.x % 32;
  const int64_t index = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (index >= num_groups) return;
  const T* from = weight + index * group;
  float largest = 0;
  for (int i = lane; i < group; i += 32) largest = fmaxf(largest, fabsf(load_one(from + i)));
  const bf16 stored = scale_for(warp_max(largest), 7);
  const float scale = __bfloat162float(stored);
  if (lane == 0) scales[index] = stored;
  for (int i = lane * 2; i < group; i += 64) {
    const int low = quantized(load_one(from + i), scale, 7),
              high = quantized(load_one(from + i + 1), scale, 7);
    data[(index * group + i) / 2] = uint8_t((low & 15) | (high & 15) << 4);
  }
}

}  // namespace

Status quantize_int8(Stream stream, DType type, const void* weight, int8_t* data, BF16* scales, int64_t n,
                     int64_t k) {
  if (n * k == 0) return nullptr;
  return with_element(type, [&](auto t) {
    using T = decltype(t);
    return launch({"quantize_int8", dim3(unsigned(n)), kThreads, 0, stream}, quantize_int8_kernel<T>,
                  static_cast<const T*>(weight), data, reinterpret_cast<bf16*>(scales), k);
  });
}

Status quantize_int4(Stream stream, DType type, const void* weight, int64_t group, uint8_t* data,
                     BF16* scales, int64_t n, int64_t k) {
  if (group < 2 || group % 2 != 0 || k % group != 0) return "group must be even and divide the columns";
  if (n * k == 0) return nullptr;
  const int64_t num_groups = n * (k / group);
  return with_element(type, [&](auto t) {
    using T = decltype(t);
    return launch({"quantize_int4", dim3(unsigned(ceil_div(num_groups, kThreads / 32))), kThreads, 0, stream},
                  quantize_int4_kernel<T>, static_cast<const T*>(weight), int(group), data,
                  reinterpret_cast<bf16*>(scales), num_groups);
  });
}

}  // namespace octet::gpu

// gpu/embedding.cu   Rows looked up, rows put in place, pixels made into activations, types converted
//
//   embed_tokens      out[i] = table[ids[i] - vocab_start], zeros where that row is not in this shard
//   scatter_rows      out[rows[i]] = source[i]
//   normalize_pixels  out = (patch / 255 - mean[channel]) / std[channel], channel-major rows
//   cast              out = x in the other type
//
//   bytes   everything read once and written once   -> bandwidth bound
//   map     a thread per eight values (pixels: per four), grid over all rows
//   needs   h % 8 == 0, features % 12 == 0, 16-byte aligned rows (pixels: 4); counts may be 0
//   order   no sums
//   source  Radford et al. 2021, arXiv:2103.00020 (mean and std of the tower's pixels)
//                                                                 twin  cpu/embedding.cc
//   speed   not yet measured

#include "elements.cuh"
#include "launchers.h"

namespace octet::gpu {
namespace {

constexpr int kThreads = 256;
constexpr const char* kOddRow = "the width of a row must be a multiple of 8";

template <class T>
__global__ void __launch_bounds__(kThreads)
    embed_tokens_kernel(const int32_t* ids, const T* table, int64_t vocab_start, T* out, int64_t num_pieces,
                        int64_t vocab_local, int h) {
  const int64_t piece = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (piece >= num_pieces) return;
  const int64_t token = piece * 8 / h, column = piece * 8 % h, row = ids[token] - vocab_start;
  Eight v = {};
  if (row >= 0 && row < vocab_local) v = load_eight(table + row * h + column);
  store_eight(out + token * h + column, v);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    scatter_rows_kernel(const T* source, const int32_t* rows, T* out, int64_t num_pieces, int64_t m, int h) {
  const int64_t piece = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (piece >= num_pieces) return;
  const int64_t from = piece * 8 / h, column = piece * 8 % h, to = rows[from];
  if (to < 0 || to >= m) return;
  store_eight(out + to * h + column, load_eight(source + from * h + column));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    normalize_pixels_kernel(const uint8_t* patches, const float* mean, const float* std, T* out,
                            int64_t num_pieces, int features) {
  const int64_t piece = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (piece >= num_pieces) return;
  const int channel = int(piece * 4 % features) / (features / 3);
  const uint32_t pixels = *reinterpret_cast<const uint32_t*>(patches + piece * 4);
  const float centre = mean[channel], width = std[channel];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float value = float(pixels >> (8 * j) & 255u) / 255.0f;
    store_one(out + piece * 4 + j, (value - centre) / width);
  }
}

template <class From, class To>
__global__ void __launch_bounds__(kThreads) cast_kernel(const From* x, To* out, int64_t size) {
  const int64_t begin = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (begin + 8 <= size) {
    store_eight(out + begin, load_eight(x + begin));
  } else {
    for (int64_t i = begin; i < size; ++i) store_one(out + i, load_one(x + i));
  }
}

dim3 blocks_for(int64_t num_threads) {
  return dim3(unsigned(ceil_div(num_threads, kThreads)));
}

}  // namespace

Status embed_tokens(Stream stream, DType type, const int32_t* ids, const void* table, int64_t vocab_start,
                    void* out, int64_t m, int64_t vocab_local, int64_t h) {
  if (h % 8 != 0) return kOddRow;
  if (m == 0) return nullptr;
  return with_element(type, [&](auto t) {
    using T = decltype(t);
    return launch({"embed_tokens", blocks_for(m * h / 8), kThreads, 0, stream}, embed_tokens_kernel<T>, ids,
                  static_cast<const T*>(table), vocab_start, static_cast<T*>(out), m * h / 8, vocab_local,
                  int(h));
  });
}

Status scatter_rows(Stream stream, DType type, const void* source, const int32_t* rows, void* out, int64_t r,
                    int64_t m, int64_t h) {
  if (h % 8 != 0) return kOddRow;
  if (r == 0) return nullptr;
  return with_element(type, [&](auto t) {
    using T = decltype(t);
    return launch({"scatter_rows", blocks_for(r * h / 8), kThreads, 0, stream}, scatter_rows_kernel<T>,
                  static_cast<const T*>(source), rows, static_cast<T*>(out), r * h / 8, m, int(h));
  });
}

Status normalize_pixels(Stream stream, const uint8_t* patches, const float* mean, const float* std,
                        DType out_type, void* out, int64_t p, int64_t features) {
  if (features % 12 != 0) return "the pixels of a patch must be a multiple of 12";
  if (p == 0) return nullptr;
  return with_element(out_type, [&](auto t) {
    using T = decltype(t);
    return launch({"normalize_pixels", blocks_for(p * features / 4), kThreads, 0, stream},
                  normalize_pixels_kernel<T>, patches, mean, std, static_cast<T*>(out), p * features / 4,
                  int(features));
  });
}

Status cast(Stream stream, DType x_type, const void* x, DType out_type, void* out, int64_t size) {
  if (size == 0) return nullptr;
  return with_element(x_type, [&](auto from) {
    return with_element(out_type, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      return launch({"cast", blocks_for(ceil_div(size, 8)), kThreads, 0, stream}, cast_kernel<From, To>,
                    static_cast<const From*>(x), static_cast<To*>(out), size);
    });
  });
}

}  // namespace octet::gpu

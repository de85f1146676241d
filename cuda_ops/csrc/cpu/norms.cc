// cpu/norms.cc   Row norms and the gated activation.
//
//   rms_norm     y = x * rsqrt(mean(x^2) + eps) * w
//   layer_norm   y = (x - mean(x)) * rsqrt(var(x) + eps) * w + b
//   silu_mul     y = gate * sigmoid(gate) * up
//
//   x, y [M, H]   read once (twice from cache), written once; w, b [H] stay in cache
//   bytes   2 * M * H * sizeof(T)   -> bandwidth bound
//   map     rows over threads, 16 lanes over H
//   needs   rows contiguous; M may be 0
//   order   16 sums over H, lane = column mod 16, then the tree of vec.h: depends on H alone
//   source  Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450; Shazeer 2020,
//   arXiv:2002.05202

#include "../include/norms.h"

#include <cmath>

#include "../common/thread_pool.h"
#include "../common/vec_math.h"

namespace octet::cpu {
namespace {

constexpr int64_t kGrain = 16384;  // elements below which a slice is not worth another thread

int64_t rows_grain(int64_t h) {
  return kGrain / h + 1;
}

template <class T>
float sum_of_squares(const T* x, int64_t h) {
  F32x16 total = zeros();
  by_sixteen(h, [&](int64_t i, int64_t n) {
    const F32x16 v = load_upto(x + i, n);
    total = fma(v, v, total);
  });
  return sum(total);
}

template <class T>
void rms_norm_row(const T* x, const T* weight, float eps, T* out, int64_t h) {
  const F32x16 scale = broadcast(1.0f / std::sqrt(sum_of_squares(x, h) / float(h) + eps));
  by_sixteen(h, [&](int64_t i, int64_t n) {
    store_upto(out + i, load_upto(x + i, n) * scale * load_upto(weight + i, n), n);
  });
}

template <class T>
void add_row(const T* x, T* residual, int64_t h) {
  by_sixteen(h, [&](int64_t i, int64_t n) {
    store_upto(residual + i, load_upto(residual + i, n) + load_upto(x + i, n), n);
  });
}

template <class T>
void layer_norm_row(const T* x, const T* weight, const T* bias, float eps, T* out, int64_t h) {
  F32x16 total = zeros();
  by_sixteen(h, [&](int64_t i, int64_t n) { total = total + load_upto(x + i, n); });
  const float mean = sum(total) / float(h);
  F32x16 squares = zeros();
  by_sixteen(h, [&](int64_t i, int64_t n) {
    F32x16 centred = load_upto(x + i, n) - broadcast(mean);
    if (n < 16) {  // the padding lanes are zero, not the mean
      float lanes[16];
      store(lanes, centred);
      centred = load_first(lanes, n);
    }
    squares = fma(centred, centred, squares);
  });
  const F32x16 scale = broadcast(1.0f / std::sqrt(sum(squares) / float(h) + eps));
  by_sixteen(h, [&](int64_t i, int64_t n) {
    const F32x16 normal = (load_upto(x + i, n) - broadcast(mean)) * scale;
    store_upto(out + i, fma(normal, load_upto(weight + i, n), load_upto(bias + i, n)), n);
  });
}

}  // namespace

Status rms_norm(DType type, const void* x, const void* weight, float eps, void* out, int64_t m, int64_t h) {
  return with_type(type, [&](auto t) -> Status {
    using T = decltype(t);
    parallel_slices(m, rows_grain(h), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        rms_norm_row((const T*)x + r * h, (const T*)weight, eps, (T*)out + r * h, h);
      }
    });
    return nullptr;
  });
}

Status add_rms_norm(DType type, const void* x, void* residual, const void* weight, float eps, void* out,
                    int64_t m, int64_t h) {
  return with_type(type, [&](auto t) -> Status {
    using T = decltype(t);
    parallel_slices(m, rows_grain(h), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        add_row((const T*)x + r * h, (T*)residual + r * h, h);
        rms_norm_row((const T*)residual + r * h, (const T*)weight, eps, (T*)out + r * h, h);
      }
    });
    return nullptr;
  });
}

Status layer_norm(DType type, const void* x, const void* weight, const void* bias, float eps, void* out,
                  int64_t m, int64_t h) {
  return with_type(type, [&](auto t) -> Status {
    using T = decltype(t);
    parallel_slices(m, rows_grain(h), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        layer_norm_row((const T*)x + r * h, (const T*)weight, (const T*)bias, eps, (T*)out + r * h, h);
      }
    });
    return nullptr;
  });
}

Status silu_mul(DType type, const void* gate_up, void* out, int64_t m, int64_t width) {
  return with_type(type, [&](auto t) -> Status {
    using T = decltype(t);
    parallel_slices(m, rows_grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* gate = (const T*)gate_up + r * 2 * width;
        const T* up = gate + width;
        T* row = (T*)out + r * width;
        by_sixteen(width, [&](int64_t i, int64_t n) {
          store_upto(row + i, silu(load_upto(gate + i, n)) * load_upto(up + i, n), n);
        });
      }
    });
    return nullptr;
  });
}

}  // namespace octet::cpu

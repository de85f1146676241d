// cpu/quantize.cc   Symmetric weight quantisation.
//
//   scale = bf16(max|w| / limit), 1 for all zeros; q = clip(round_half_away(w / scale), -limit, limit)
//   int8: one scale per row, limit 127      int4: one scale per `group` columns of a row, limit 7
//
//   bytes   the weight once (twice from cache)   -> bandwidth bound
//   map     rows over threads
//   needs   rows contiguous; group even and a divisor of K
//   order   maxima only. The scale is rounded first and divided by afterwards, so q is the nearest multiple
//           of the scale that will be stored

#include "../include/quantize.h"

#include <cstring>

#include "../common/thread_pool.h"
#include "../common/vec_int8.h"
#include "../common/vec_math.h"

namespace octet::cpu {
namespace {

template <class T>
float largest_magnitude(const T* w, int64_t size) {
  F32x16 highest = zeros();
  by_sixteen(size, [&](int64_t i, int64_t n) {
    const F32x16 v = load_upto(w + i, n);
    highest = max(highest, max(v, zeros() - v));
  });
  return max_lane(highest);
}

BF16 scale_for(float magnitude, float limit) {
  const BF16 scale = to_bf16(magnitude / limit);
  return to_float(scale) > 0.0f ? scale : to_bf16(1.0f);
}

// Halves away from zero.
F32x16 quantized(F32x16 w, F32x16 scale, F32x16 limit) {
  const F32x16 steps = w / scale, size = max(steps, zeros() - steps), nearest = round(size);
  const F32x16 away = select_less(size - nearest, broadcast(0.5f), nearest, nearest + broadcast(1.0f));
  const F32x16 inside = min(away, limit);
  return select_less(steps, zeros(), zeros() - inside, inside);
}

}  // namespace

Status quantize_int8(DType type, const void* weight, int8_t* data, BF16* scales, int64_t n, int64_t k) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    parallel_slices(n, 4, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* row = (const T*)weight + r * k;
        scales[r] = scale_for(largest_magnitude(row, k), 127.0f);
        const F32x16 scale = broadcast(to_float(scales[r])), limit = broadcast(127.0f);
        by_sixteen(k, [&](int64_t c, int64_t n) {
          int8_t q[16];
          store_int8(q, quantized(load_upto(row + c, n), scale, limit));
          std::memcpy(data + r * k + c, q, size_t(n));
        });
      }
    });
  });
  return nullptr;
}

Status quantize_int4(DType type, const void* weight, int64_t group, uint8_t* data, BF16* scales, int64_t n,
                     int64_t k) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    parallel_slices(n * (k / group), 64, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const T* from = (const T*)weight + g * group;
        scales[g] = scale_for(largest_magnitude(from, group), 7.0f);
        const F32x16 scale = broadcast(to_float(scales[g])), limit = broadcast(7.0f);
        by_sixteen(group, [&](int64_t c, int64_t n) {
          uint8_t q[8];
          store_nibbles(q, quantized(load_upto(from + c, n), scale, limit));
          std::memcpy(data + (g * group + c) / 2, q, size_t(n / 2));
        });
      }
    });
  });
  return nullptr;
}

}  // namespace octet::cpu

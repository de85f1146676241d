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

#include <algorithm>
#include <cmath>

#include "../common/thread_pool.h"
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

int quantized(float w, float scale, float limit) {
  const float q = std::round(w / scale);  // halves away from zero
  return int(std::clamp(q, -limit, limit));
}

}  // namespace

Status quantize_int8(DType type, const void* weight, int8_t* data, BF16* scales, int64_t n, int64_t k) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    parallel_slices(n, 4, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* row = (const T*)weight + r * k;
        scales[r] = scale_for(largest_magnitude(row, k), 127.0f);
        const float scale = to_float(scales[r]);
        for (int64_t c = 0; c < k; ++c) data[r * k + c] = int8_t(quantized(to_float(row[c]), scale, 127.0f));
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
        const float scale = to_float(scales[g]);
        for (int64_t c = 0; c < group; c += 2) {
          const int low = quantized(to_float(from[c]), scale, 7.0f);
          const int high = quantized(to_float(from[c + 1]), scale, 7.0f);
          data[(g * group + c) / 2] = uint8_t((low & 15) | (high & 15) << 4);
        }
      }
    });
  });
  return nullptr;
}

}  // namespace octet::cpu

// include/weight_view.h   A weight matrix as kernels see it: pointers, kind and scale groups.

#pragma once

#include <cstdint>

#include "../common/bf16.h"

namespace octet {

enum class WeightKind { float32, bfloat16, int8, int4 };

// W [out_features, in_features], rows contiguous along in_features.
//   float32, bfloat16   data as it is
//   int8                W = q * scales[row]
//   int4                two's complement nibbles, low nibble = even column; W = q * scales[row, column /
//   group]
// is_packed   int8 and int4 only: the same bytes in the order of cpu/int8_panels.h, for bf16 activations
// q * scale is exact in fp32 (at most 7 + 8 significant bits), so a quantised product with fp32
// activations has the very bits of the product with the dequantised matrix.
struct WeightView {
  WeightKind kind;
  const void* data;
  const BF16* scales;  // [out_features] or [out_features, in_features / group]; null unless quantised
  int64_t group;       // columns per int4 scale
  int64_t out_features;
  int64_t in_features;
  bool is_packed = false;

  int64_t row_bytes() const {
    switch (kind) {
      case WeightKind::float32:
        return in_features * 4;
      case WeightKind::bfloat16:
        return in_features * 2;
      case WeightKind::int8:
        return in_features;
      case WeightKind::int4:
        return in_features / 2;
    }
    return 0;
  }
  int64_t scales_per_row() const {
    return kind == WeightKind::int8 ? 1 : kind == WeightKind::int4 ? in_features / group : 0;
  }
  const void* row(int64_t n) const { return static_cast<const char*>(data) + n * row_bytes(); }
  const BF16* row_scales(int64_t n) const { return scales + n * scales_per_row(); }

  // Matrix `index` of a stack [count, out_features, in_features].
  WeightView at(int64_t index) const {
    WeightView one = *this;
    one.data = row(index * out_features);
    if (scales) one.scales = row_scales(index * out_features);
    return one;
  }
};

}  // namespace octet

// cpu/int8_rows.h   Rows of activations as int8 with a scale per span of columns.
//
//   scale = max|x| / 127 over a span;  q = nearest(x * (127 / max|x|)), ties to even;  x ~ q * scale
//
// A span is 64 columns (32 where int4 groups are no multiple of 64), so the error of an element is at most
// scale / 2 = max|x| / 254 of its span. It depends on the row alone. One row in memory:
//
//   q [spans * span]  int8, or ByteElement for int8 weights; zero beyond K; in an order, see below
//   float scale [spans]
//   int32 correction [spans] = -offset * sum(q)
//
// Weights meet these bytes as unsigned numbers w = W + offset (8 for int4, 128 for int8), which is what
// vpdpbusd multiplies; starting a sum at the correction makes it sum(q * W) exactly. A 32-bit word of int4
// weights holds 8 columns and unpacks to its even ones, then its odd ones, so for int4 the bytes of every 8
// columns are kept as 0 2 4 6 1 3 5 7. For int8 weights AVX2 takes q in 16 bits (vec_int8.h).

#pragma once

#include "../common/status.h"
#include "../common/vec_int8.h"
#include "../common/vec_math.h"
#include "../include/weight_view.h"

namespace octet::cpu {

struct Int8Layout {
  int64_t in_features, span;
  bool is_int4;

  explicit Int8Layout(const WeightView& w)
      : in_features(w.in_features),
        span(w.kind == WeightKind::int4 && w.group % 64 != 0 ? 32 : 64),
        is_int4(w.kind == WeightKind::int4) {}

  bool operator==(const Int8Layout&) const = default;
  int64_t spans() const { return ceil_div(in_features, span); }
  int64_t element_bytes() const { return is_int4 ? 1 : int64_t(sizeof(ByteElement)); }
  int64_t row_bytes() const { return ceil_div(spans() * (span * element_bytes() + 8), 64) * 64; }
  int32_t offset() const { return is_int4 ? 8 : 128; }

  float* scales(void* row) const {
    return reinterpret_cast<float*>(static_cast<char*>(row) + spans() * span * element_bytes());
  }
  int32_t* corrections(void* row) const { return reinterpret_cast<int32_t*>(scales(row) + spans()); }

  const float* scales(const void* row) const { return scales(const_cast<void*>(row)); }
  const int32_t* corrections(const void* row) const { return corrections(const_cast<void*>(row)); }
};

constexpr float kSmallest = 1e-36f;  // 127 / x must stay finite; a span below this becomes zeros

// Columns [first, first + size) of a row; first is a multiple of span, and only the row's end may cut a span.
template <class T>
void quantise_columns(const Int8Layout& layout, const T* x, int64_t first, int64_t size, void* row) {
  for (int64_t begin = 0; begin < size; begin += layout.span) {
    const int64_t length = begin + layout.span < size ? layout.span : size - begin;
    alignas(64) float values[64] = {};
    F32x16 highest = zeros();
    by_sixteen(length, [&](int64_t i, int64_t n) {
      const F32x16 v = load_upto(x + begin + i, n);
      highest = max(highest, max(v, zeros() - v));
      store(values + i, v);
    });
    const float largest = max_lane(highest);
    const F32x16 inverse = broadcast(largest > kSmallest ? 127.0f / largest : 0.0f);
    const int64_t at = (first + begin) / layout.span;
    F32x16 total = zeros();  // exact: at most 64 * 127
    for (int64_t i = 0; i < layout.span; i += 16) {
      const F32x16 steps = round(load(values + i) * inverse);
      const F32x16 q = max(broadcast(-127.0f), min(steps, broadcast(127.0f)));  // NaN becomes a number
      const int64_t column = first + begin + i;
      if (layout.is_int4) {
        store_elements(static_cast<int8_t*>(row) + column, q);
        evens_first(static_cast<int8_t*>(row) + column);
      } else {
        store_elements(static_cast<ByteElement*>(row) + column, q);
      }
      total = total + q;
    }
    layout.scales(row)[at] = largest / 127.0f;
    layout.corrections(row)[at] = -layout.offset() * int32_t(sum(total));
  }
}

}  // namespace octet::cpu

// cpu/row_form.h   The form in which rows of activations meet a weight: fp32, bf16 or int8 with scales.
//
//   x fp32                        fp32: products with a quantised weight are exact up to the fp32 sum
//   x bf16, W bf16                bf16 where the machine multiplies it (vdpbf16ps), else fp32
//   x bf16, W int8 or int4        int8 (int8_rows.h); int4 in groups that 32 does not divide: fp32
//
// linear.cc and moe.cc convert rows once per call and then multiply them with any panel of the weight.

#pragma once

#include "dot_panel.h"
#include "int8_dot.h"
#include "int8_rows.h"
#include "rows.h"

namespace octet::cpu {

constexpr Status kPackedTakesBfloat16 = "a packed weight takes bfloat16 activations only";

class RowForm {
 public:
  RowForm(DType x_type, const WeightView& w)
      : x_type_(x_type),
        is_int8_(x_type == DType::bfloat16 &&
                 (w.kind == WeightKind::int8 || (w.kind == WeightKind::int4 && w.group % 32 == 0))),
        dot_type_(dot_type(x_type, w.kind)),
        in_features_(w.in_features),
        layout_(w) {}

  bool is_int8() const { return is_int8_; }
  bool is_bfloat16() const { return !is_int8_ && dot_type_ == DType::bfloat16; }
  const Int8Layout& layout() const { return layout_; }

  // Whether rows converted for `other` serve here as they are.
  bool is_same_as(const RowForm& other) const {
    return is_int8_ == other.is_int8_ && (is_int8_ ? layout_ == other.layout_ : dot_type_ == other.dot_type_);
  }
  // Whether x itself is in this form.
  bool is_plain() const { return !is_int8_ && dot_type_ == x_type_; }
  int64_t row_bytes() const { return is_int8_ ? layout_.row_bytes() : in_features_ * size_of(dot_type_); }

  // x [num_rows, in_features] of x_type -> out [num_rows, row_bytes]
  void convert(const void* x, int64_t num_rows, char* out) const {
    constexpr int64_t kGrain = 8;  // rows; fewer are not worth waking a thread for
    parallel_slices(num_rows, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        convert_row(row_of(x_type_, x, i, in_features_), out + i * row_bytes());
    });
  }

  // Weight rows that one task should take.
  int64_t panel_width(int64_t out_features) const {
    return is_int8_ ? kInt8Width : octet::cpu::panel_width(out_features, in_features_);
  }
  // Columns that whoever makes rows in this form must make at once.
  int64_t column_unit() const { return is_int8_ ? layout_.span : 1; }

  // out[i * out_stride + j] = rows[i] . W[first_row + j]
  void multiply(const void* const* rows, int64_t num_rows, const WeightView& w, int64_t first_row,
                int64_t width, float* out, int64_t out_stride) const {
    if (is_int8_) return int8_dot(rows, num_rows, w, first_row, width, out, out_stride);
    return dot_panel(dot_type_, rows, num_rows, w, first_row, width, out, out_stride);
  }

 private:
  static constexpr int64_t kInt8Width = 64;  // about 100 KB of weights

  void convert_row(const void* x, char* out) const {
    const BF16* from = static_cast<const BF16*>(x);  // fp32 rows are plain
    if (is_int8_) return quantise_columns(layout_, from, 0, in_features_, out);
    by_sixteen(in_features_, [&](int64_t i, int64_t n) {
      store_upto(reinterpret_cast<float*>(out) + i, load_upto(from + i, n), n);
    });
  }

  DType x_type_;
  bool is_int8_;
  DType dot_type_;
  int64_t in_features_;
  Int8Layout layout_;
};

}  // namespace octet::cpu

// cpu/dot_panel.h   Products of chosen activation rows with consecutive weight rows.
//
// The inner loop of linear, MoE experts and routing for fp32 and bf16 rows (int8 rows: int8_dot.h). Each
// output is one dot product over K with a fixed shape: 16 sums (lane = column mod 16, or pair of columns for
// bf16 dot products), columns ascending, then the tree of vec.h. Neither the number of rows nor the tile an
// output falls into takes part.

#pragma once

#include "../common/status.h"
#include "../include/weight_view.h"

namespace octet::cpu {

// Activation rows wide enough to amortise one dequantised panel; more rows per call only help.
constexpr int64_t kRowBlock = 192;

// Whether this machine multiplies bf16 activations with bf16 weights directly (vdpbf16ps). If not, and for
// all other weights, activations must be given as fp32.
bool has_bf16_dot();
inline DType dot_type(DType x_type, WeightKind kind) {
  return x_type == DType::bfloat16 && kind == WeightKind::bfloat16 && has_bf16_dot() ? DType::bfloat16
                                                                                     : DType::float32;
}

// Weight rows that a task should take so that their dequantised form stays in the second-level cache, and
// so that there are tasks for every thread.
int64_t panel_width(int64_t out_features, int64_t in_features);

// out[i * out_stride + j] = x_rows[i] . W[first_row + j]   for i < num_rows, j < width; fp32.
// x_rows point to rows of dot_type(...) elements.
void dot_panel(DType x_type, const void* const* x_rows, int64_t num_rows, const WeightView& w,
               int64_t first_row, int64_t width, float* out, int64_t out_stride);

}  // namespace octet::cpu

// cpu/int8_dot.h   Products of int8 activation rows with consecutive rows of an int8 or int4 weight.

#pragma once

#include "../common/status.h"
#include "../include/weight_view.h"

namespace octet::cpu {

// out[i * out_stride + j] = x_rows[i] . W[first_row + j]   for i < num_rows, j < width; fp32.
// x_rows point to rows of Int8Layout(w). width of a whole task is best a multiple of 32.
void int8_dot(const void* const* x_rows, int64_t num_rows, const WeightView& w, int64_t first_row,
              int64_t width, float* out, int64_t out_stride);

}  // namespace octet::cpu

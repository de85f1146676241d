// include/linear.h   out = activation(x @ W^T + bias), and the conversion between activation types.
//
// A CUDA twin is declared beside each function in namespace octet::gpu, with a stream as first argument.

#pragma once

#include "../common/status.h"
#include "weight_view.h"

namespace octet {

enum class Activation { none, gelu, quick_gelu };

namespace cpu {

// x [M, K] x_type, w [N, K], bias [N] bias_type or null, out [M, N] out_type; one rounding at the end.
Status linear(DType x_type, const void* x, const WeightView& w, DType bias_type, const void* bias,
              Activation activation, DType out_type, void* out, int64_t m);

// x [size] -> out [size]
Status cast(DType x_type, const void* x, DType out_type, void* out, int64_t size);

// x [size] += y [size], rounded once
Status add(DType type, void* x, const void* y, int64_t size);

}  // namespace cpu
}  // namespace octet

// include/norms.h   Row norms and the gated activation. Statistics in fp32, one rounding at the end.
//
// A CUDA twin is declared beside each function in namespace octet::gpu, with a stream as first argument.

#pragma once

#include "../common/status.h"

namespace octet::cpu {

// x [M, H] T, weight [H] T -> out [M, H] T
Status rms_norm(DType type, const void* x, const void* weight, float eps, void* out, int64_t m, int64_t h);

// residual [M, H] += x, rounded to T; out = rms_norm(residual)
Status add_rms_norm(DType type, const void* x, void* residual, const void* weight, float eps, void* out,
                    int64_t m, int64_t h);

// x [M, H], weight [H], bias [H] -> out [M, H]
Status layer_norm(DType type, const void* x, const void* weight, const void* bias, float eps, void* out,
                  int64_t m, int64_t h);

// gate_up [M, 2 * width] -> out [M, width] = silu(first half) * second half
Status silu_mul(DType type, const void* gate_up, void* out, int64_t m, int64_t width);

}  // namespace octet::cpu

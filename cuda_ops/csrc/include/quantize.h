// include/quantize.h   Weight matrices made int8 or int4.
//
// A CUDA twin is declared beside each function in namespace octet::gpu, with a stream as first argument.

#pragma once

#include "../common/status.h"

namespace octet::cpu {

// weight [N, K] -> data [N, K] int8, scales [N]
Status quantize_int8(DType type, const void* weight, int8_t* data, BF16* scales, int64_t n, int64_t k);

// weight [N, K] -> data [N, K / 2], low nibble = even column; scales [N, K / group]
Status quantize_int4(DType type, const void* weight, int64_t group, uint8_t* data, BF16* scales, int64_t n,
                     int64_t k);

}  // namespace octet::cpu

// include/repeat.h   Memory filled with a repeated block of bytes.
//
// A CUDA twin is declared in ../gpu/launchers.h, with a stream as first argument.

#pragma once

#include "../common/status.h"

namespace octet::cpu {

// out[i, j] = block[(first_row + i) % rows, (first_column + j) % columns], n rows of `width` bytes
Status repeat_block(const uint8_t* block, int64_t rows, int64_t columns, int64_t first_row,
                    int64_t first_column, uint8_t* out, int64_t n, int64_t width);

}  // namespace octet::cpu

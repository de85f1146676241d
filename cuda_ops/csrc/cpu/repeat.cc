// cpu/repeat.cc   Memory filled with a repeated block of bytes.
//
//   out[i, j] = block[(first_row + i) % rows, (first_column + j) % columns]
//
//   bytes   n * width written, the block stays in cache   -> bandwidth bound
//   map     rows over threads
//   order   no sums

#include "../include/repeat.h"

#include <algorithm>
#include <cstring>

#include "../common/thread_pool.h"

namespace octet::cpu {

Status repeat_block(const uint8_t* block, int64_t rows, int64_t columns, int64_t first_row,
                    int64_t first_column, uint8_t* out, int64_t n, int64_t width) {
  parallel_slices(n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* row = block + (first_row + i) % rows * columns;
      int64_t column = first_column % columns;
      for (int64_t j = 0; j < width;) {
        const int64_t run = std::min(columns - column, width - j);
        std::memcpy(out + i * width + j, row + column, size_t(run));
        j += run;
        column = 0;
      }
    }
  });
  return nullptr;
}

}  // namespace octet::cpu

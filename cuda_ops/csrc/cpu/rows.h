// cpu/rows.h   Activation rows in the type of the dot products, and results on their way out.

#pragma once

#include "../common/scratch.h"
#include "../common/thread_pool.h"
#include "../common/vec_math.h"

namespace octet::cpu {

// x [num_rows, width] as rows of `wanted`; x itself when it already is that type, else a copy in scratch that
// lives until this thread converts again.
inline const void* as_type(DType x_type, const void* x, DType wanted, int64_t num_rows, int64_t width) {
  if (x_type == wanted) return x;
  float* copy = scratch<float>(Slot::activations, size_t(num_rows * width));
  const BF16* from = static_cast<const BF16*>(x);
  parallel_slices(num_rows * width, 32768, [&](int64_t begin, int64_t end) {
    by_sixteen(end - begin, [&](int64_t i, int64_t n) {
      store_upto(copy + begin + i, load_upto(from + begin + i, n), n);
    });
  });
  return copy;
}

inline int64_t size_of(DType type) {
  return type == DType::bfloat16 ? 2 : 4;
}

inline const void* row_of(DType type, const void* x, int64_t row, int64_t width) {
  return static_cast<const char*>(x) + row * width * size_of(type);
}

}  // namespace octet::cpu

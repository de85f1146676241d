// cpu/ahead.h   Weights that come later, asked for while a tile of products computes.
//
// The products of a tile fill the window in which a core looks for loads. Left to that and to the
// prefetchers, memory waits for products and products for memory: their times add up, where the longer one
// would do.

#pragma once

#include "../common/status.h"

namespace octet::cpu {

// Lines of memory, so many per step of a tile.
struct Ahead {
  static constexpr int64_t kLine = 64;  // bytes

  const char* next = nullptr;
  const char* end = nullptr;
  int64_t per_step = 0;

  // What tile `index` of `count` asks for of the `size` bytes from `first` on, which all ask for together.
  static Ahead part(const void* first, int64_t size, int64_t index, int64_t count, int64_t steps) {
    const int64_t bytes = size / count;
    const char* begin = static_cast<const char*>(first) + index * bytes;
    return {begin, begin + bytes, ceil_div(bytes, kLine * steps)};
  }

  // Once per step. Into the second-level cache; what lies behind the memory is no error.
  void ask() {
    for (int64_t i = 0; i < per_step && next < end; ++i, next += kLine) __builtin_prefetch(next, 0, 2);
  }
};

}  // namespace octet::cpu

// common/status.h   What a launcher returns, and the element types it accepts.

#pragma once

#include <cstdint>

#include "bf16.h"

namespace octet {

// nullptr: done. Otherwise what is wrong, in words; the boundary adds the op's name and raises it.
using Status = const char*;

enum class DType { float32, bfloat16 };

// Calls body(T{}) with the C++ type of `dtype`, so that a kernel template is written once.
template <class Body>
auto with_type(DType dtype, Body body) {
  return dtype == DType::bfloat16 ? body(BF16{}) : body(float{});
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace octet

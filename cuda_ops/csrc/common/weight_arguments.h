// common/weight_arguments.h   Arguments of the ops that make weights, checked once for both boundaries.
//
// Bodies as in row_arguments.h; what the arguments mean is said in cuda_ops/quantize.py and repeat.py.

#pragma once

#include <string>

#include "row_arguments.h"

namespace octet {

template <class Body>
void quantize_int8(TensorView weight, TensorView data, TensorView scales) {
  Checks check("quantize_int8");
  Dim N("N"), K("K");
  check(weight, "weight", {&N, &K}, kActivation)(data, "data", {&N, &K}, kInt8);
  check(scales, "scales", {&N}, kBFloat16);
  check.done(
      Body::run(dtype_of(weight), data_of(weight), data_of<int8_t>(data), data_of<BF16>(scales), N, K));
}

template <class Body>
void quantize_int4(TensorView weight, int64_t group, TensorView data, TensorView scales) {
  Checks check("quantize_int4");
  Dim N("N"), K("K");
  check(weight, "weight", {&N, &K}, kActivation);
  check.require(
      group > 0 && group % 2 == 0 && K % group == 0,
      "group must be even and divide K=" + std::to_string(K.value()) + ", got " + std::to_string(group));
  Dim packed("K/2", K / 2), groups("K/group", K / group);
  check(data, "data", {&N, &packed}, kUInt8)(scales, "scales", {&N, &groups}, kBFloat16);
  check.done(Body::run(dtype_of(weight), data_of(weight), group, data_of<uint8_t>(data),
                       data_of<BF16>(scales), N, K));
}

template <class Body>
void repeat_block(TensorView block, int64_t first_row, int64_t first_column, TensorView out) {
  Checks check("repeat_block");
  Dim R("R"), C("C"), N("N"), K("K");
  check(block, "block", {&R, &C}, kUInt8)(out, "out", {&N, &K}, kInt8 | kUInt8 | kActivation);
  check.require(R > 0 && C > 0 && first_row >= 0 && first_column >= 0,
                "the block and where it begins must exist");
  const int64_t width = K * out.dtype().bits / 8;
  check.done(
      Body::run(data_of<uint8_t>(block), R, C, first_row, first_column, data_of<uint8_t>(out), N, width));
}

}  // namespace octet

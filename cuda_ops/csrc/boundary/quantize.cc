// boundary/quantize.cc   Exported: quantize_int8, quantize_int4.

#include "../include/quantize.h"

#include "../common/checks.h"

namespace octet {
namespace {

void quantize_int8(TensorView weight, TensorView data, TensorView scales) {
  Checks check("quantize_int8");
  Dim N("N"), K("K");
  check(weight, "weight", {&N, &K}, kActivation)(data, "data", {&N, &K}, kInt8);
  check(scales, "scales", {&N}, kBFloat16);
  check.done(cpu::quantize_int8(dtype_of(weight), data_of(weight), data_of<int8_t>(data),
                                data_of<BF16>(scales), N, K));
}

void quantize_int4(TensorView weight, int64_t group, TensorView data, TensorView scales) {
  Checks check("quantize_int4");
  Dim N("N"), K("K");
  check(weight, "weight", {&N, &K}, kActivation);
  check.require(
      group > 0 && group % 2 == 0 && K % group == 0,
      "group must be even and divide K=" + std::to_string(K.value()) + ", got " + std::to_string(group));
  Dim packed("K/2", K / 2), groups("K/group", K / group);
  check(data, "data", {&N, &packed}, kUInt8)(scales, "scales", {&N, &groups}, kBFloat16);
  check.done(cpu::quantize_int4(dtype_of(weight), data_of(weight), group, data_of<uint8_t>(data),
                                data_of<BF16>(scales), N, K));
}

OCTET_EXPORT_OP(quantize_int8, quantize_int8)
OCTET_EXPORT_OP(quantize_int4, quantize_int4)

}  // namespace
}  // namespace octet

// gpu_boundary/repeat.cc   Exported: repeat_block.

#include "device.h"

namespace octet {
namespace {

void repeat_block(TensorView block, int64_t first_row, int64_t first_column, TensorView out) {
  Checks check("repeat_block");
  Dim R("R"), C("C"), N("N"), K("K");
  check(block, "block", {&R, &C}, kUInt8)(out, "out", {&N, &K}, kInt8 | kUInt8 | kActivation);
  check.require(R > 0 && C > 0 && first_row >= 0 && first_column >= 0,
                "the block and where it begins must exist");
  const int64_t width = K * out.dtype().bits / 8;
  check.done(gpu::repeat_block(current_stream(), data_of<uint8_t>(block), R, C, first_row, first_column,
                               data_of<uint8_t>(out), N, width));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(repeat_block, repeat_block);

}  // namespace
}  // namespace octet

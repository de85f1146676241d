// boundary/pictures.cc   Exported: resize_patches.

#include "../include/pictures.h"

#include "../common/checks.h"

namespace octet {
namespace {

void resize_patches(TensorView pixels, int64_t out_rows, int64_t out_columns, TensorView patches) {
  Checks check("resize_patches");
  Dim rows("rows"), columns("columns"), four(4), features(588);
  Dim count("out_rows/14*out_columns/14", out_rows / 14 * (out_columns / 14));
  check(pixels, "pixels", {&rows, &columns, &four}, kUInt8)(patches, "patches", {&count, &features}, kUInt8);
  check.done(cpu::resize_patches(data_of<uint8_t>(pixels), rows, columns, out_rows, out_columns,
                                 data_of<uint8_t>(patches)));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(resize_patches, resize_patches);

}  // namespace
}  // namespace octet

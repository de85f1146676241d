// boundary/embedding.cc   Exported: embed_tokens, scatter_rows, normalize_pixels.

#include "../include/embedding.h"

#include "../common/checks.h"

namespace octet {
namespace {

void embed_tokens(TensorView ids, TensorView table, int64_t vocab_start, TensorView out) {
  Checks check("embed_tokens");
  Dim M("M"), V("V_local"), H("H");
  check(ids, "ids", {&M}, kInt32)(table, "table", {&V, &H}, kActivation)(out, "out", {&M, &H}, kActivation);
  check.same_type(table, "table", out, "out");
  check.done(cpu::embed_tokens(dtype_of(table), data_of<int32_t>(ids), data_of(table), vocab_start,
                               data_of(out), M, V, H));
}

void scatter_rows(TensorView source, TensorView rows, TensorView out) {
  Checks check("scatter_rows");
  Dim R("R"), M("M"), H("H");
  check(source, "source", {&R, &H}, kActivation)(rows, "rows", {&R}, kInt32);
  check(out, "out", {&M, &H}, kActivation);
  check.same_type(source, "source", out, "out");
  check.done(
      cpu::scatter_rows(dtype_of(source), data_of(source), data_of<int32_t>(rows), data_of(out), R, M, H));
}

void normalize_pixels(TensorView patches, TensorView mean, TensorView std, TensorView out) {
  Checks check("normalize_pixels");
  Dim P("P"), features("3*patch*patch"), three(3);
  check(patches, "patches", {&P, &features}, kUInt8)(mean, "mean", {&three}, kFloat32);
  check(std, "std", {&three}, kFloat32)(out, "out", {&P, &features}, kActivation);
  check.require(features % 3 == 0, "patches must hold three channels");
  check.done(cpu::normalize_pixels(data_of<uint8_t>(patches), data_of<float>(mean), data_of<float>(std),
                                   dtype_of(out), data_of(out), P, features));
}

OCTET_EXPORT_OP(embed_tokens, embed_tokens)
OCTET_EXPORT_OP(scatter_rows, scatter_rows)
OCTET_EXPORT_OP(normalize_pixels, normalize_pixels)

}  // namespace
}  // namespace octet

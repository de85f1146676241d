// gpu_boundary/rows.cc   Exported: norms, gating, rope, lookups, pixels, cast, bias and activation.
//
// Arguments are those of the CPU functions of the same names in ../boundary, where they are explained.

#include "device.h"

namespace octet {
namespace {

void rms_norm(TensorView x, TensorView weight, double eps, TensorView out) {
  Checks check("rms_norm");
  Dim M("M"), H("H");
  check(x, "x", {&M, &H}, kActivation)(weight, "weight", {&H}, kActivation)(out, "out", {&M, &H},
                                                                            kActivation);
  check.same_type(x, "x", weight, "weight");
  check.same_type(x, "x", out, "out");
  check.done(gpu::rms_norm(current_stream(), dtype_of(x), data_of(x), data_of(weight), float(eps),
                           data_of(out), M, H));
}

void add_rms_norm(TensorView x, TensorView residual, TensorView weight, double eps, TensorView out) {
  Checks check("add_rms_norm");
  Dim M("M"), H("H");
  check(x, "x", {&M, &H}, kActivation)(residual, "residual", {&M, &H}, kActivation);
  check(weight, "weight", {&H}, kActivation)(out, "out", {&M, &H}, kActivation);
  check.same_type(x, "x", residual, "residual");
  check.same_type(x, "x", weight, "weight");
  check.same_type(x, "x", out, "out");
  check.done(gpu::add_rms_norm(current_stream(), dtype_of(x), data_of(x), data_of(residual), data_of(weight),
                               float(eps), data_of(out), M, H));
}

void layer_norm(TensorView x, TensorView weight, TensorView bias, double eps, TensorView out) {
  Checks check("layer_norm");
  Dim M("M"), H("H");
  check(x, "x", {&M, &H}, kActivation)(weight, "weight", {&H}, kActivation);
  check(bias, "bias", {&H}, kActivation)(out, "out", {&M, &H}, kActivation);
  check.same_type(x, "x", weight, "weight");
  check.same_type(x, "x", bias, "bias");
  check.same_type(x, "x", out, "out");
  check.done(gpu::layer_norm(current_stream(), dtype_of(x), data_of(x), data_of(weight), data_of(bias),
                             float(eps), data_of(out), M, H));
}

void silu_mul(TensorView gate_up, TensorView out) {
  Checks check("silu_mul");
  Dim M("M"), I("I");
  check(out, "out", {&M, &I}, kActivation);
  Dim both("2I", 2 * I);
  check(gate_up, "gate_up", {&M, &both}, kActivation);
  check.same_type(gate_up, "gate_up", out, "out");
  check.done(gpu::silu_mul(current_stream(), dtype_of(out), data_of(gate_up), data_of(out), M, I));
}

void bias_activation(TensorView x, Optional<TensorView> bias, int64_t activation) {
  Checks check("bias_activation");
  Dim M("M"), N("N");
  check(x, "x", {&M, &N}, kActivation);
  if (bias.has_value()) {
    check(*bias, "bias", {&N}, kActivation);
    check.same_type(x, "x", *bias, "bias");
  }
  check.done(gpu::bias_activation(current_stream(), dtype_of(x), data_of(x),
                                  bias.has_value() ? data_of(*bias) : nullptr, Activation(activation), M, N));
}

void cast(TensorView x, TensorView out) {
  Checks check("cast");
  check.require(x.ndim() == out.ndim() && x.numel() == out.numel(), "x and out must have one shape");
  Dim size("size");
  check.flat(x, "x", size, kActivation);
  check.flat(out, "out", size, kActivation);
  check.done(gpu::cast(current_stream(), dtype_of(x), data_of(x), dtype_of(out), data_of(out), size));
}

void rope_angles(TensorView positions, TensorView axis, TensorView inv_freq, TensorView cos_sin) {
  Checks check("rope_angles");
  Dim three(3), two(2), M("M"), pairs("hd/2");
  check(positions, "positions", {&three, &M}, kInt32)(axis, "axis", {&pairs}, kInt32);
  check(inv_freq, "inv_freq", {&pairs}, kFloat32)(cos_sin, "cos_sin", {&M, &pairs, &two}, kFloat32);
  check.done(gpu::rope_angles(current_stream(), data_of<int32_t>(positions), data_of<int32_t>(axis),
                              data_of<float>(inv_freq), data_of<float>(cos_sin), M, pairs));
}

void vision_rope(TensorView qkv, TensorView row_col, double theta) {
  Checks check("vision_rope");
  Dim P("P"), three(3), heads("heads"), hd("hd"), two(2);
  check(qkv, "qkv", {&P, &three, &heads, &hd}, kActivation)(row_col, "row_col", {&P, &two}, kInt32);
  check.done(gpu::vision_rope(current_stream(), dtype_of(qkv), data_of(qkv), data_of<int32_t>(row_col),
                              float(theta), P, heads, hd));
}

void embed_tokens(TensorView ids, TensorView table, int64_t vocab_start, TensorView out) {
  Checks check("embed_tokens");
  Dim M("M"), V("V_local"), H("H");
  check(ids, "ids", {&M}, kInt32)(table, "table", {&V, &H}, kActivation)(out, "out", {&M, &H}, kActivation);
  check.same_type(table, "table", out, "out");
  check.done(gpu::embed_tokens(current_stream(), dtype_of(table), data_of<int32_t>(ids), data_of(table),
                               vocab_start, data_of(out), M, V, H));
}

void scatter_rows(TensorView source, TensorView rows, TensorView out) {
  Checks check("scatter_rows");
  Dim R("R"), M("M"), H("H");
  check(source, "source", {&R, &H}, kActivation)(rows, "rows", {&R}, kInt32);
  check(out, "out", {&M, &H}, kActivation);
  check.same_type(source, "source", out, "out");
  check.done(gpu::scatter_rows(current_stream(), dtype_of(source), data_of(source), data_of<int32_t>(rows),
                               data_of(out), R, M, H));
}

void normalize_pixels(TensorView patches, TensorView mean, TensorView std, TensorView out) {
  Checks check("normalize_pixels");
  Dim P("P"), features("3*patch*patch"), three(3);
  check(patches, "patches", {&P, &features}, kUInt8)(mean, "mean", {&three}, kFloat32);
  check(std, "std", {&three}, kFloat32)(out, "out", {&P, &features}, kActivation);
  check.done(gpu::normalize_pixels(current_stream(), data_of<uint8_t>(patches), data_of<float>(mean),
                                   data_of<float>(std), dtype_of(out), data_of(out), P, features));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm, rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_rms_norm, add_rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_norm, layer_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_mul, silu_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(bias_activation, bias_activation);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cast, cast);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_angles, rope_angles);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(vision_rope, vision_rope);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(embed_tokens, embed_tokens);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scatter_rows, scatter_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(normalize_pixels, normalize_pixels);

}  // namespace
}  // namespace octet

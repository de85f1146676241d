// common/row_arguments.h   Arguments of the ops that work row by row, checked once for both boundaries.
//
// `Body::run` takes what the body of the op takes: OnCpu<cpu::NAME> here, OnStream<gpu::NAME> in
// gpu_boundary/device.h. What the arguments mean is said in the module of cuda_ops that has the op.

#pragma once

#include <string>

#include "checks.h"

namespace octet {

template <auto body>
struct OnCpu {
  template <class... Arguments>
  static Status run(const Arguments&... arguments) {
    return body(arguments...);
  }
};

template <class Body>
void rms_norm(TensorView x, TensorView weight, double eps, TensorView out) {
  Checks check("rms_norm");
  Dim M("M"), H("H");
  check(x, "x", {&M, &H}, kActivation)(weight, "weight", {&H}, kActivation)(out, "out", {&M, &H},
                                                                            kActivation);
  check.same_type(x, "x", weight, "weight");
  check.same_type(x, "x", out, "out");
  check.done(Body::run(dtype_of(x), data_of(x), data_of(weight), float(eps), data_of(out), M, H));
}

template <class Body>
void add_rms_norm(TensorView x, TensorView residual, TensorView weight, double eps, TensorView out) {
  Checks check("add_rms_norm");
  Dim M("M"), H("H");
  check(x, "x", {&M, &H}, kActivation)(residual, "residual", {&M, &H}, kActivation);
  check(weight, "weight", {&H}, kActivation)(out, "out", {&M, &H}, kActivation);
  check.same_type(x, "x", residual, "residual");
  check.same_type(x, "x", weight, "weight");
  check.same_type(x, "x", out, "out");
  check.done(
      Body::run(dtype_of(x), data_of(x), data_of(residual), data_of(weight), float(eps), data_of(out), M, H));
}

template <class Body>
void layer_norm(TensorView x, TensorView weight, TensorView bias, double eps, TensorView out) {
  Checks check("layer_norm");
  Dim M("M"), H("H");
  check(x, "x", {&M, &H}, kActivation)(weight, "weight", {&H}, kActivation);
  check(bias, "bias", {&H}, kActivation)(out, "out", {&M, &H}, kActivation);
  check.same_type(x, "x", weight, "weight");
  check.same_type(x, "x", bias, "bias");
  check.same_type(x, "x", out, "out");
  check.done(
      Body::run(dtype_of(x), data_of(x), data_of(weight), data_of(bias), float(eps), data_of(out), M, H));
}

template <class Body>
void silu_mul(TensorView gate_up, TensorView out) {
  Checks check("silu_mul");
  Dim M("M"), I("I");
  check(out, "out", {&M, &I}, kActivation);
  Dim both("2I", 2 * I);
  check(gate_up, "gate_up", {&M, &both}, kActivation);
  check.same_type(gate_up, "gate_up", out, "out");
  check.done(Body::run(dtype_of(out), data_of(gate_up), data_of(out), M, I));
}

template <class Body>
void cast(TensorView x, TensorView out) {
  Checks check("cast");
  bool has_one_shape = x.ndim() == out.ndim();
  for (int32_t i = 0; has_one_shape && i < x.ndim(); ++i) has_one_shape = x.size(i) == out.size(i);
  check.require(has_one_shape, "x and out must have one shape");
  Dim size("size");
  check.flat(x, "x", size, kActivation);
  check.flat(out, "out", size, kActivation);
  check.done(Body::run(dtype_of(x), data_of(x), dtype_of(out), data_of(out), size));
}

template <class Body>
void rope_angles(TensorView positions, TensorView axis, TensorView inv_freq, TensorView cos_sin) {
  Checks check("rope_angles");
  Dim three(3), two(2), M("M"), pairs("hd/2");
  check(positions, "positions", {&three, &M}, kInt32)(axis, "axis", {&pairs}, kInt32);
  check(inv_freq, "inv_freq", {&pairs}, kFloat32)(cos_sin, "cos_sin", {&M, &pairs, &two}, kFloat32);
  check.done(Body::run(data_of<int32_t>(positions), data_of<int32_t>(axis), data_of<float>(inv_freq),
                       data_of<float>(cos_sin), M, pairs));
}

template <class Body>
void vision_rope(TensorView qkv, TensorView row_col, double theta) {
  Checks check("vision_rope");
  Dim P("P"), three(3), heads("heads"), hd("hd"), two(2);
  check(qkv, "qkv", {&P, &three, &heads, &hd}, kActivation)(row_col, "row_col", {&P, &two}, kInt32);
  check.require(hd % 4 == 0, "hd must be a multiple of 4, got " + std::to_string(hd.value()));
  check.done(Body::run(dtype_of(qkv), data_of(qkv), data_of<int32_t>(row_col), float(theta), P, heads, hd));
}

template <class Body>
void embed_tokens(TensorView ids, TensorView table, int64_t vocab_start, TensorView out) {
  Checks check("embed_tokens");
  Dim M("M"), V("V_local"), H("H");
  check(ids, "ids", {&M}, kInt32)(table, "table", {&V, &H}, kActivation)(out, "out", {&M, &H}, kActivation);
  check.same_type(table, "table", out, "out");
  check.done(
      Body::run(dtype_of(table), data_of<int32_t>(ids), data_of(table), vocab_start, data_of(out), M, V, H));
}

template <class Body>
void scatter_rows(TensorView source, TensorView rows, TensorView out) {
  Checks check("scatter_rows");
  Dim R("R"), M("M"), H("H");
  check(source, "source", {&R, &H}, kActivation)(rows, "rows", {&R}, kInt32);
  check(out, "out", {&M, &H}, kActivation);
  check.same_type(source, "source", out, "out");
  check.done(Body::run(dtype_of(source), data_of(source), data_of<int32_t>(rows), data_of(out), R, M, H));
}

template <class Body>
void normalize_pixels(TensorView patches, TensorView mean, TensorView std, TensorView out) {
  Checks check("normalize_pixels");
  Dim P("P"), features("3*patch*patch"), three(3);
  check(patches, "patches", {&P, &features}, kUInt8)(mean, "mean", {&three}, kFloat32);
  check(std, "std", {&three}, kFloat32)(out, "out", {&P, &features}, kActivation);
  check.require(features % 3 == 0, "patches must hold three channels");
  check.done(Body::run(data_of<uint8_t>(patches), data_of<float>(mean), data_of<float>(std), dtype_of(out),
                       data_of(out), P, features));
}

template <class Body>
void feed_tokens(TensorView sources, TensorView sampled, int64_t vision_from, TensorView token_ids,
                 TensorView token_types) {
  Checks check("feed_tokens");
  Dim M("M"), S("S");
  check(sources, "sources", {&M}, kInt32)(sampled, "sampled", {&S}, kInt32);
  check(token_ids, "token_ids", {&M}, kInt32)(token_types, "token_types", {&M}, kInt32);
  check.done(Body::run(data_of<int32_t>(sources), data_of<int32_t>(sampled), S, vision_from,
                       data_of<int32_t>(token_ids), data_of<int32_t>(token_types), M));
}

}  // namespace octet

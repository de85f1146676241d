// boundary/norms.cc   Exported: rms_norm, add_rms_norm, layer_norm, silu_mul.

#include "../include/norms.h"

#include "../common/checks.h"

namespace octet {
namespace {

void rms_norm(TensorView x, TensorView weight, double eps, TensorView out) {
  Checks check("rms_norm");
  Dim M("M"), H("H");
  check(x, "x", {&M, &H}, kActivation)(weight, "weight", {&H}, kActivation)(out, "out", {&M, &H},
                                                                            kActivation);
  check.same_type(x, "x", weight, "weight");
  check.same_type(x, "x", out, "out");
  check.done(cpu::rms_norm(dtype_of(x), data_of(x), data_of(weight), float(eps), data_of(out), M, H));
}

void add_rms_norm(TensorView x, TensorView residual, TensorView weight, double eps, TensorView out) {
  Checks check("add_rms_norm");
  Dim M("M"), H("H");
  check(x, "x", {&M, &H}, kActivation)(residual, "residual", {&M, &H}, kActivation);
  check(weight, "weight", {&H}, kActivation)(out, "out", {&M, &H}, kActivation);
  check.same_type(x, "x", residual, "residual");
  check.same_type(x, "x", weight, "weight");
  check.same_type(x, "x", out, "out");
  check.done(cpu::add_rms_norm(dtype_of(x), data_of(x), data_of(residual), data_of(weight), float(eps),
                               data_of(out), M, H));
}

void layer_norm(TensorView x, TensorView weight, TensorView bias, double eps, TensorView out) {
  Checks check("layer_norm");
  Dim M("M"), H("H");
  check(x, "x", {&M, &H}, kActivation)(weight, "weight", {&H}, kActivation);
  check(bias, "bias", {&H}, kActivation)(out, "out", {&M, &H}, kActivation);
  check.same_type(x, "x", weight, "weight");
  check.same_type(x, "x", bias, "bias");
  check.same_type(x, "x", out, "out");
  check.done(cpu::layer_norm(dtype_of(x), data_of(x), data_of(weight), data_of(bias), float(eps),
                             data_of(out), M, H));
}

void silu_mul(TensorView gate_up, TensorView out) {
  Checks check("silu_mul");
  Dim M("M"), I("I");
  check(out, "out", {&M, &I}, kActivation);
  Dim both("2I", 2 * I);
  check(gate_up, "gate_up", {&M, &both}, kActivation);
  check.same_type(gate_up, "gate_up", out, "out");
  check.done(cpu::silu_mul(dtype_of(out), data_of(gate_up), data_of(out), M, I));
}

OCTET_EXPORT_OP(rms_norm, rms_norm)
OCTET_EXPORT_OP(add_rms_norm, add_rms_norm)
OCTET_EXPORT_OP(layer_norm, layer_norm)
OCTET_EXPORT_OP(silu_mul, silu_mul)

}  // namespace
}  // namespace octet

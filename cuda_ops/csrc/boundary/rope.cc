// boundary/rope.cc   Exported: rope_angles, rope_write_kv, vision_rope.

#include "../include/rope.h"

#include "../common/checks.h"
#include "kv_cache.h"

namespace octet {
namespace {

void rope_angles(TensorView positions, TensorView axis, TensorView inv_freq, TensorView cos_sin) {
  Checks check("rope_angles");
  Dim three(3), two(2), M("M"), pairs("hd/2");
  check(positions, "positions", {&three, &M}, kInt32)(axis, "axis", {&pairs}, kInt32);
  check(inv_freq, "inv_freq", {&pairs}, kFloat32)(cos_sin, "cos_sin", {&M, &pairs, &two}, kFloat32);
  check.done(cpu::rope_angles(data_of<int32_t>(positions), data_of<int32_t>(axis), data_of<float>(inv_freq),
                              data_of<float>(cos_sin), M, pairs));
}

void rope_write_kv(TensorView qkv, TensorView cos_sin, TensorView slots, TensorView k_cache,
                   TensorView v_cache, TensorView q_out, Optional<TensorView> k_scales,
                   Optional<TensorView> v_scales) {
  Checks check("rope_write_kv");
  Dim M("M"), nq("nq"), nkv("nkv"), hd("hd"), blocks("num_blocks"), size("block_size"), two(2);
  check(q_out, "q_out", {&M, &nq, &hd}, kActivation);
  const cpu::KvCache cache =
      check_cache(check, q_out, k_cache, v_cache, k_scales, v_scales, blocks, nkv, size, hd);
  Dim width("(nq+2nkv)*hd", (nq + 2 * nkv) * hd), pairs("hd/2", hd / 2);
  check(qkv, "qkv", {&M, &width}, kActivation)(cos_sin, "cos_sin", {&M, &pairs, &two}, kFloat32);
  check(slots, "slots", {&M}, kInt32);
  check.require(hd % 2 == 0, "hd must be even");
  check.same_type(qkv, "qkv", q_out, "q_out");
  check.done(cpu::rope_write_kv(dtype_of(qkv), data_of(qkv), data_of<float>(cos_sin), data_of<int32_t>(slots),
                                cache, data_of(q_out), M, nq, {blocks, nkv, size, hd}));
}

void vision_rope(TensorView qkv, TensorView row_col, double theta) {
  Checks check("vision_rope");
  Dim P("P"), three(3), heads("heads"), hd("hd"), two(2);
  check(qkv, "qkv", {&P, &three, &heads, &hd}, kActivation)(row_col, "row_col", {&P, &two}, kInt32);
  check.require(hd % 4 == 0, "hd must be a multiple of 4, got " + std::to_string(hd.value()));
  check.done(
      cpu::vision_rope(dtype_of(qkv), data_of(qkv), data_of<int32_t>(row_col), float(theta), P, heads, hd));
}

OCTET_EXPORT_OP(rope_angles, rope_angles)
OCTET_EXPORT_OP(rope_write_kv, rope_write_kv)
OCTET_EXPORT_OP(vision_rope, vision_rope)

}  // namespace
}  // namespace octet

// boundary/rope.cc   Exported: rope_angles, rope_write_kv, vision_rope.

#include "../include/rope.h"

#include "../common/row_arguments.h"
#include "kv_cache.h"

namespace octet {
namespace {

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

OCTET_EXPORT_OP(rope_angles, rope_angles<OnCpu<cpu::rope_angles>>)
OCTET_EXPORT_OP(rope_write_kv, rope_write_kv)
OCTET_EXPORT_OP(vision_rope, vision_rope<OnCpu<cpu::vision_rope>>)

}  // namespace
}  // namespace octet

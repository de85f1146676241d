// boundary/kv_cache.h   Checks the tensors of a paged KV cache: of the activations' type, or int8 with
// scales.

#pragma once

#include "../common/checks.h"
#include "../include/rope.h"

namespace octet {

inline cpu::KvCache check_cache(const Checks& check, const TensorView& q, const TensorView& k,
                                const TensorView& v, const Optional<TensorView>& k_scales,
                                const Optional<TensorView>& v_scales, Dim& blocks, Dim& nkv, Dim& size,
                                Dim& hd) {
  const bool is_int8 = k_scales.has_value();
  check.require(is_int8 == v_scales.has_value(), "k_scales and v_scales come together");
  const unsigned types = is_int8 ? kInt8 : kActivation;
  check(k, "k_cache", {&blocks, &nkv, &size, &hd}, types)(v, "v_cache", {&blocks, &nkv, &size, &hd}, types);
  if (!is_int8) {
    check.same_type(q, "q", k, "k_cache");
    check.same_type(q, "q", v, "v_cache");
    return {data_of(k), data_of(v), nullptr, nullptr};
  }
  check(*k_scales, "k_scales", {&blocks, &nkv, &size}, kBFloat16);
  check(*v_scales, "v_scales", {&blocks, &nkv, &size}, kBFloat16);
  return {data_of(k), data_of(v), data_of<BF16>(*k_scales), data_of<BF16>(*v_scales)};
}

}  // namespace octet

// gpu/linear.cu   Dense products: out = activation(x @ W^T + bias), W packed
//
//   x [M, K] bf16   W packed (packed_weight.h)   out [M, N] bf16 or fp32; gated: out [M, N / 2] = silu * up
//
//   bytes, map, order   those of grouped_linear.cuh with one group
//   needs   K % 8 == 0, x and W 16-byte aligned; M may be 0
//   source  see grouped_linear.cuh                                twin  cpu/linear.cc
//   speed   not yet measured

#include "launchers.h"

namespace octet::gpu {

const char* grouped_linear(void* stream, const GroupedLinear& p) {
  if (p.num_groups < 1 || p.num_groups > kMaxGroups) return "there must be 1 to 256 experts";
  for (int pool = 0; pool * p.groups_per_pool < p.num_groups; ++pool) {
    const PackedWeight& w = p.pools[pool];
    if (w.in_features % 8 != 0) return "in_features must be a multiple of 8";
    if (w.kind != p.pools[0].kind || w.is_gated != p.pools[0].is_gated)
      return "both pools must be packed alike";
  }
  if (p.num_rows == 0) return nullptr;
  switch (p.pools[0].kind) {
    case WeightKind::int4:
      return grouped_linear_int4(stream, p);
    case WeightKind::int8:
      return grouped_linear_int8(stream, p);
    case WeightKind::bfloat16:
      return grouped_linear_bf16(stream, p);
    case WeightKind::float32:
      return grouped_linear_fp32(stream, p);
  }
  return "unknown weight kind";
}

Status linear(Stream stream, const void* x, const PackedWeight& w, const void* bias, Activation activation,
              DType out_type, void* out, int64_t m) {
  if (w.is_gated && (bias || activation != Activation::none)) {
    return "a gated weight takes neither bias nor activation: it is silu(gate) * up already";
  }
  GroupedLinear p = {};
  p.x = x;
  p.x_stride = w.in_features;
  p.input_divisor = 1;
  p.out = out;
  p.out_stride = w.is_gated ? w.out_features / 2 : w.out_features;
  p.out_is_float = out_type == DType::float32;
  p.num_rows = p.typical_rows = int32_t(m);
  p.num_groups = p.groups_per_pool = 1;
  p.pools[0] = w;
  p.bias = bias;
  p.activation = activation;
  return grouped_linear(stream, p);
}

}  // namespace octet::gpu

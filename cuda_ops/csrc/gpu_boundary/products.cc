// gpu_boundary/products.cc   Exported: making and tiling weights, linear, routing and experts.

#include <vector>

#include "../common/weight_arguments.h"
#include "device.h"

namespace octet {
namespace {

using ffi::Array;
using ffi::Tensor;

// The rows of a weight, plain, any number of stacked matrices: [count * N, K] seen as the caller has it.
void tile_weight(TensorView data, Optional<TensorView> data_scales, int64_t kind, TensorView tiles,
                 Optional<TensorView> scales, int64_t group, int64_t out_features, int64_t in_features,
                 bool is_gated) {
  Checks check("tile_weight");
  Dim count("count", tiles.ndim() == 4 ? tiles.size(0) : 1);
  const gpu::PackedWeight packed =
      check_tiled(check, "tiled", {kind, tiles, scales, group, out_features, in_features, is_gated},
                  tiles.ndim() == 4 ? &count : nullptr);
  static const unsigned types[] = {kFloat32, kBFloat16, kInt8, kUInt8};
  Dim size("elements", count * out_features * in_features / (packed.kind == WeightKind::int4 ? 2 : 1));
  check.flat(data, "data", size, types[int(packed.kind)]);
  const bool is_quantised = packed.scales != nullptr;
  check.require(data_scales.has_value() == is_quantised, "scales come with int8 and int4 weights only");
  WeightView view{packed.kind, data_of(data), nullptr, group, out_features, in_features};
  if (is_quantised) {
    Dim num_scales("scales", count * out_features * view.scales_per_row());
    check.flat(*data_scales, "scales", num_scales, kBFloat16);
    view.scales = data_of<BF16>(*data_scales);
  }
  check.done(gpu::pack_weight(current_stream(), view, count, packed));
}

void linear(TensorView x, int64_t kind, TensorView tiles, Optional<TensorView> scales, int64_t group,
            int64_t out_features, int64_t in_features, bool is_gated, TensorView out,
            Optional<TensorView> bias, int64_t activation) {
  Checks check("linear");
  const gpu::PackedWeight weight = check_tiled(
      check, "weight", {kind, tiles, scales, group, out_features, in_features, is_gated}, nullptr);
  Dim M("M"), K("K", in_features), N("N", is_gated ? out_features / 2 : out_features);
  check(x, "x", {&M, &K}, kBFloat16)(out, "out", {&M, &N}, kActivation);
  if (bias.has_value()) check(*bias, "bias", {&N}, kBFloat16);
  check.done(gpu::linear(current_stream(), data_of(x), weight, bias.has_value() ? data_of(*bias) : nullptr,
                         Activation(activation), dtype_of(out), data_of(out), M));
}

int64_t routing_workspace_bytes(int64_t m, int64_t hidden, int64_t num_pools, int64_t num_experts) {
  return gpu::router_parts(hidden) * m * num_pools * num_experts * 4;
}

// router: float32 tiles of router_parts(H) matrices, each all experts of all pools by its part of the
// columns.
void route_experts(TensorView x, TensorView router, TensorView bias, TensorView token_types, int64_t top_k,
                   double norm_min, TensorView expert_ids, TensorView expert_weights) {
  Checks check("route_experts");
  Dim M("M"), P("P"), E("E"), H("H"), k("k", top_k);
  check(x, "x", {&M, &H}, kBFloat16)(bias, "bias", {&P, &E}, kFloat32);
  check(token_types, "token_types", {&M}, kInt32)(expert_ids, "expert_ids", {&M, &k}, kInt32);
  check(expert_weights, "expert_weights", {&M, &k}, kFloat32);
  const int64_t parts = gpu::router_parts(H);
  Dim stack("router parts", parts);
  const TiledArguments tiled{int64_t(WeightKind::float32), router, std::nullopt, 0, P * E, H / parts, false};
  const gpu::PackedWeight packed = check_tiled(check, "router", tiled, &stack);
  void* logits = workspace(check, routing_workspace_bytes(M, H, P, E));
  check.done(gpu::route_experts(current_stream(), data_of(x), packed, data_of<float>(bias),
                                data_of<int32_t>(token_types), float(norm_min), data_of<int32_t>(expert_ids),
                                data_of<float>(expert_weights), M, H, P, E, top_k,
                                static_cast<float*>(logits)));
}

// Per pool up_gate then down. Plain kinds repeat their tiles where scales would be.
void moe_experts(TensorView x, TensorView expert_ids, TensorView expert_weights, Array<Tensor> tiles,
                 Array<Tensor> scales, Array<int64_t> kinds, Array<int64_t> groups, Array<int64_t> widths,
                 TensorView out) {
  Checks check("moe_experts");
  Dim M("M"), H("H"), E("E"), k("k");
  check(x, "x", {&M, &H}, kBFloat16)(out, "out", {&M, &H}, kBFloat16);
  check(expert_ids, "expert_ids", {&M, &k}, kInt32)(expert_weights, "expert_weights", {&M, &k}, kFloat32);
  check.require(tiles.size() > 0, "pools must hold at least one pool");
  const auto weight = [&](size_t i, const char* name, int64_t out_features, int64_t in_features,
                          bool is_gated) {
    const bool has_scales = kinds[i] >= int64_t(WeightKind::int8);
    const Optional<TensorView> scale =
        has_scales ? Optional<TensorView>(TensorView(scales[i])) : std::nullopt;
    return check_tiled(
        check, "pools[" + std::to_string(i / 2) + "]." + name,
        {kinds[i], TensorView(tiles[i]), scale, groups[i], out_features, in_features, is_gated}, &E);
  };
  std::vector<gpu::PackedExperts> pools;
  int64_t max_width = 0;
  for (size_t i = 0; i < size_t(tiles.size()); i += 2) {
    const int64_t width = widths[i / 2];
    max_width = std::max(max_width, width);
    pools.push_back({weight(i, "up_gate", 2 * width, H, true), weight(i + 1, "down", H, width, false)});
  }
  const int64_t num_pools = int64_t(pools.size());
  void* memory = workspace(check, gpu::moe_workspace_bytes(M, H, k, max_width, num_pools * E));
  check.done(gpu::moe_experts(current_stream(), data_of(x), data_of<int32_t>(expert_ids),
                              data_of<float>(expert_weights), pools.data(), num_pools, E, data_of(out), M, H,
                              k, memory));
}

int64_t moe_workspace_bytes(int64_t m, int64_t hidden, int64_t top_k, int64_t max_width, int64_t experts) {
  return gpu::moe_workspace_bytes(m, hidden, top_k, max_width, experts);
}
int64_t router_parts(int64_t hidden) {
  return gpu::router_parts(hidden);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(repeat_block, repeat_block<OnStream<gpu::repeat_block>>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize_int8, quantize_int8<OnStream<gpu::quantize_int8>>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize_int4, quantize_int4<OnStream<gpu::quantize_int4>>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tile_weight, tile_weight);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear_tiled, linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(route_experts, route_experts);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(routing_workspace_bytes, routing_workspace_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(router_parts, router_parts);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe_experts_tiled, moe_experts);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe_workspace_bytes, moe_workspace_bytes);

}  // namespace
}  // namespace octet

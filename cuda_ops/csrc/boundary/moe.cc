// boundary/moe.cc   Exported: route_experts, moe_experts.

#include "../include/moe.h"

#include <vector>

#include "../common/checks.h"

namespace octet {
namespace {

using ffi::Array;
using ffi::Tensor;

void route_experts(TensorView x, TensorView router, TensorView bias, TensorView token_types, int64_t top_k,
                   double norm_min, TensorView expert_ids, TensorView expert_weights) {
  Checks check("route_experts");
  Dim M("M"), P("P"), E("E"), H("H"), k("k", top_k);
  check(x, "x", {&M, &H}, kActivation)(router, "router", {&P, &E, &H}, kFloat32);
  check(bias, "bias", {&P, &E}, kFloat32)(token_types, "token_types", {&M}, kInt32);
  check(expert_ids, "expert_ids", {&M, &k}, kInt32)(expert_weights, "expert_weights", {&M, &k}, kFloat32);
  check.require(k >= 1 && k <= E,
                "top_k must be 1 to E=" + std::to_string(E.value()) + ", got " + std::to_string(top_k));
  check.done(cpu::route_experts(dtype_of(x), data_of(x), data_of<float>(router), data_of<float>(bias),
                                data_of<int32_t>(token_types), float(norm_min), data_of<int32_t>(expert_ids),
                                data_of<float>(expert_weights), M, {P, E, H, k}));
}

// Arrays hold, for each pool and then for the shared expert, up_gate then down; plain kinds repeat their data
// where scales would be.
void moe_experts(TensorView x, TensorView expert_ids, TensorView expert_weights, Array<Tensor> data,
                 Array<Tensor> scales, Array<int64_t> kinds, Array<int64_t> groups, bool has_shared,
                 TensorView out) {
  Checks check("moe_experts");
  Dim M("M"), H("H"), E("E"), k("k");
  check(x, "x", {&M, &H}, kActivation)(out, "out", {&M, &H}, kActivation);
  check(expert_ids, "expert_ids", {&M, &k}, kInt32)(expert_weights, "expert_weights", {&M, &k}, kFloat32);
  check.same_type(x, "x", out, "out");
  const auto weight = [&](size_t i, const std::string& name, Dim* stack, Dim& rows, Dim& columns) {
    const bool has_scales = kinds[i] >= int64_t(WeightKind::int8);  // packed kinds are larger still
    const Optional<TensorView> scale =
        has_scales ? Optional<TensorView>(TensorView(scales[i])) : std::nullopt;
    return check_weight(check, name.c_str(), kinds[i], TensorView(data[i]), scale, groups[i], stack, rows,
                        columns);
  };
  std::vector<cpu::ExpertPool> pools;
  for (size_t i = 0; i < size_t(data.size()); i += 2) {
    const bool is_shared = has_shared && i + 2 == size_t(data.size());
    const std::string name = is_shared ? "shared" : "pools[" + std::to_string(i / 2) + "]";
    Dim* const stack = is_shared ? nullptr : &E;
    Dim width("width");
    const WeightView down = weight(i + 1, name + ".down", stack, H, width);
    Dim both("2*width", 2 * width);
    pools.push_back({weight(i, name + ".up_gate", stack, both, H), down});
  }
  const int64_t num_pools = int64_t(pools.size()) - has_shared;
  check.require(num_pools > 0, "pools must hold at least one pool");
  check.done(cpu::moe_experts(dtype_of(x), data_of(x), data_of<int32_t>(expert_ids),
                              data_of<float>(expert_weights), pools.data(), num_pools, E, has_shared,
                              data_of(out), M, H, k));
}

OCTET_EXPORT_OP(route_experts, route_experts)
OCTET_EXPORT_OP(moe_experts, moe_experts)

}  // namespace
}  // namespace octet

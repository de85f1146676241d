// boundary/weight.cc   Checks the tensors of a cuda_ops.Weight and turns them into a WeightView.

#include "../common/checks.h"

namespace octet {
namespace {

unsigned data_type(WeightKind kind) {
  switch (kind) {
    case WeightKind::float32:
      return kFloat32;
    case WeightKind::bfloat16:
      return kBFloat16;
    case WeightKind::int8:
      return kInt8;
    case WeightKind::int4:
      return kUInt8;
  }
  return 0;
}

void check_stacked(const Checks& check, const TensorView& tensor, const std::string& name, Dim* stack, Dim& n,
                   Dim* k, unsigned types) {
  if (stack && k) check(tensor, name.c_str(), {stack, &n, k}, types);
  if (stack && !k) check(tensor, name.c_str(), {stack, &n}, types);
  if (!stack && k) check(tensor, name.c_str(), {&n, k}, types);
  if (!stack && !k) check(tensor, name.c_str(), {&n}, types);
}

}  // namespace

WeightView check_weight(const Checks& check, const char* name, int64_t kind_index, const TensorView& data,
                        const Optional<TensorView>& scales, int64_t group, Dim* stack, Dim& out_features,
                        Dim& in_features) {
  constexpr int64_t kPacked = 16;  // added to the kind; see Weight.arguments
  const bool is_packed = kind_index >= kPacked;
  const WeightKind kind = WeightKind(kind_index % kPacked);
  const std::string prefix = std::string(name) + ".";
  Dim packed("K/2", in_features.value() < 0 ? -1 : in_features.value() / 2);
  const bool is_int4 = kind == WeightKind::int4;
  check_stacked(check, data, prefix + "data", stack, out_features, is_int4 ? &packed : &in_features,
                data_type(kind));
  if (is_int4) in_features.bind(packed * 2);

  const bool is_quantised = kind == WeightKind::int8 || is_int4;
  check.require(
      scales.has_value() == is_quantised,
      prefix + (is_quantised ? "scales are missing" : "scales belong to int8 and int4 weights only"));
  if (is_int4) {
    check.require(group > 0 && group % 2 == 0 && in_features % group == 0,
                  prefix + "group must be even and divide K=" + std::to_string(in_features.value()) +
                      ", got " + std::to_string(group));
    Dim groups("K/group", in_features / group);
    check_stacked(check, *scales, prefix + "scales", stack, out_features, &groups, kBFloat16);
  } else if (is_quantised) {
    check_stacked(check, *scales, prefix + "scales", stack, out_features, nullptr, kBFloat16);
  }
  const BF16* scale_data = is_quantised ? data_of<BF16>(*scales) : nullptr;
  return WeightView{kind, data_of(data), scale_data, group, out_features, in_features, is_packed};
}

}  // namespace octet

// boundary/pack.cc   Exported: pack_panels.

#include "../include/pack.h"

#include "../common/checks.h"

namespace octet {
namespace {

void pack_panels(int64_t kind, TensorView data, TensorView scales, int64_t group) {
  Checks check("pack_panels");
  Dim stack("stack"), N("N"), K("K");
  const bool is_stack = data.ndim() == 3;
  const WeightView weight =
      check_weight(check, "weight", kind, data, scales, group, is_stack ? &stack : nullptr, N, K);
  check.require(!weight.is_packed, "the weight is packed already");
  check.done(cpu::pack_panels(weight, data_of(data), data_of<BF16>(scales), is_stack ? stack.value() : 1));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_panels, pack_panels);

}  // namespace
}  // namespace octet

// boundary/linear.cc   Exported: linear, cast, add, set_num_threads.

#include "../include/linear.h"

#include "../common/row_arguments.h"
#include "../common/thread_pool.h"

namespace octet {
namespace {

void linear(TensorView x, int64_t kind, TensorView data, Optional<TensorView> scales, int64_t group,
            TensorView out, Optional<TensorView> bias, int64_t activation) {
  Checks check("linear");
  Dim M("M"), N("N"), K("K");
  check(x, "x", {&M, &K}, kActivation);
  const WeightView weight = check_weight(check, "weight", kind, data, scales, group, nullptr, N, K);
  check(out, "out", {&M, &N}, kActivation);
  if (bias.has_value()) check(*bias, "bias", {&N}, kActivation);
  check.done(cpu::linear(dtype_of(x), data_of(x), weight, bias.has_value() ? dtype_of(*bias) : DType::float32,
                         bias.has_value() ? data_of(*bias) : nullptr, Activation(activation), dtype_of(out),
                         data_of(out), M));
}

void add(TensorView x, TensorView y) {
  Checks check("add");
  Dim size("size");
  check.flat(x, "x", size, kActivation);
  check.flat(y, "y", size, kActivation);
  check.same_type(x, "x", y, "y");
  check.done(cpu::add(dtype_of(x), data_of(x), data_of(y), size));
}

void set_threads(int64_t num_threads) {
  Checks check("set_num_threads");
  check.require(num_threads >= 1 && num_threads <= 1024,
                "the number of threads must be 1 to 1024, got " + std::to_string(num_threads));
  set_num_threads(int(num_threads));
}

OCTET_EXPORT_OP(linear, linear)
OCTET_EXPORT_OP(cast, cast<OnCpu<cpu::cast>>)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add, add);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_num_threads, set_threads);

}  // namespace
}  // namespace octet

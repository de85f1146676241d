// gpu_boundary/rows.cc   Exported: norms, gating, rope, lookups, pixels, cast, feedback, bias and activation.

#include "../common/row_arguments.h"
#include "device.h"

namespace octet {
namespace {

void bias_activation(TensorView x, Optional<TensorView> bias, int64_t activation) {
  Checks check("bias_activation");
  Dim M("M"), N("N");
  check(x, "x", {&M, &N}, kActivation);
  if (bias.has_value()) {
    check(*bias, "bias", {&N}, kActivation);
    check.same_type(x, "x", *bias, "bias");
  }
  check.done(gpu::bias_activation(current_stream(), dtype_of(x), data_of(x),
                                  bias.has_value() ? data_of(*bias) : nullptr, Activation(activation), M, N));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(bias_activation, bias_activation);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm, rms_norm<OnStream<gpu::rms_norm>>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_rms_norm, add_rms_norm<OnStream<gpu::add_rms_norm>>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_norm, layer_norm<OnStream<gpu::layer_norm>>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_mul, silu_mul<OnStream<gpu::silu_mul>>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cast, cast<OnStream<gpu::cast>>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_angles, rope_angles<OnStream<gpu::rope_angles>>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(vision_rope, vision_rope<OnStream<gpu::vision_rope>>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(embed_tokens, embed_tokens<OnStream<gpu::embed_tokens>>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scatter_rows, scatter_rows<OnStream<gpu::scatter_rows>>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(normalize_pixels, normalize_pixels<OnStream<gpu::normalize_pixels>>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(feed_tokens, feed_tokens<OnStream<gpu::feed_tokens>>);

}  // namespace
}  // namespace octet

// gpu_boundary/sampling.cc   Exported: sample_tokens, sampling_workspace_bytes.
//
// history_starts and banned_starts are on the device and not looked into.

#include "../common/sampling_arguments.h"
#include "device.h"

namespace octet {
namespace {

struct OnDevice {
  static Status run(const Checks& check, float* logits, const SamplingBatch& batch,
                    const SamplingResult& result, const SamplingSizes&) {
    void* scratch = workspace(check, gpu::sampling_workspace_bytes(batch.num_rows, batch.vocab));
    return gpu::sample_tokens(current_stream(), logits, batch, result, scratch);
  }
};

int64_t sampling_workspace_bytes(int64_t num_rows, int64_t vocab) {
  return gpu::sampling_workspace_bytes(num_rows, vocab);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample_tokens, sample_tokens<OnDevice>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sampling_workspace_bytes, sampling_workspace_bytes);

}  // namespace
}  // namespace octet

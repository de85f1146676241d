// boundary/sampling.cc   Exported: sample_tokens.

#include "../common/sampling_arguments.h"

namespace octet {
namespace {

struct OnCpu {
  static Status run(const Checks& check, float* logits, const SamplingBatch& batch,
                    const SamplingResult& result, const SamplingSizes& sizes) {
    check.require(batch.history_starts[batch.num_rows] <= sizes.history,
                  "history is shorter than history_starts say");
    check.require(batch.banned_starts[batch.num_rows] <= sizes.banned,
                  "banned is shorter than banned_starts say");
    return cpu::sample_tokens(logits, batch, result);
  }
};

OCTET_EXPORT_OP(sample_tokens, sample_tokens<OnCpu>)

}  // namespace
}  // namespace octet

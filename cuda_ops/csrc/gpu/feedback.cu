// gpu/feedback.cu   Sampled tokens made the next step's input
//
//   token_ids[i] = sampled[sources[i]], token_types[i] = token_ids[i] >= vision_from, where there is a source
//
//   bytes   a few per row   -> nothing beside its own launch
//   map     one thread per row
//   order   no sums                                                              twin  cpu/feedback.cc

#include <launch.cuh>

#include "launchers.h"

namespace octet::gpu {
namespace {

constexpr int kThreads = 256;

__global__ void feed_tokens_kernel(const int32_t* sources, const int32_t* sampled, int64_t num_sampled,
                                   int64_t vision_from, int32_t* token_ids, int32_t* token_types, int64_t m) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= m || sources[i] < 0 || sources[i] >= num_sampled) return;
  const int32_t id = sampled[sources[i]];
  token_ids[i] = id;
  token_types[i] = id >= vision_from;
}

}  // namespace

Status feed_tokens(Stream stream, const int32_t* sources, const int32_t* sampled, int64_t num_sampled,
                   int64_t vision_from, int32_t* token_ids, int32_t* token_types, int64_t m) {
  if (m == 0) return nullptr;
  return launch({"feed_tokens", dim3(unsigned((m + kThreads - 1) / kThreads)), kThreads, 0, stream},
                feed_tokens_kernel, sources, sampled, num_sampled, vision_from, token_ids, token_types, m);
}

}  // namespace octet::gpu

// cpu/feedback.cc   Sampled tokens made the next step's input.
//
//   token_ids[i] = sampled[sources[i]], token_types[i] = token_ids[i] >= vision_from, where there is a source
//
//   bytes   a few per row   -> nothing beside its own call
//   map     one thread
//   order   no sums

#include "../include/feedback.h"

namespace octet::cpu {

Status feed_tokens(const int32_t* sources, const int32_t* sampled, int64_t num_sampled, int64_t vision_from,
                   int32_t* token_ids, int32_t* token_types, int64_t m) {
  for (int64_t i = 0; i < m; ++i) {
    if (sources[i] < 0 || sources[i] >= num_sampled) continue;
    token_ids[i] = sampled[sources[i]];
    token_types[i] = token_ids[i] >= vision_from;
  }
  return nullptr;
}

}  // namespace octet::cpu

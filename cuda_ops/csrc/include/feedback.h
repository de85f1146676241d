// include/feedback.h   Sampled tokens made the next step's input.
//
// A CUDA twin is declared in ../gpu/launchers.h, with a stream as first argument.

#pragma once

#include "../common/status.h"

namespace octet::cpu {

// token_ids[i] = sampled[sources[i]] and token_types[i] = its type, where 0 <= sources[i] < num_sampled; [M]
Status feed_tokens(const int32_t* sources, const int32_t* sampled, int64_t num_sampled, int64_t vision_from,
                   int32_t* token_ids, int32_t* token_types, int64_t m);

}  // namespace octet::cpu

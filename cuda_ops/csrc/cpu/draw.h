// cpu/draw.h   One token at random, by noise that is a function of seed, counter and token alone.

#pragma once

#include "cutoff.h"

namespace octet::cpu {

// The id of the highest logit + noise among the tokens of logits [vocab] that are `last` or better, the
// lowest id where sums are equal; -1 where there is none. The noise is that of sampling.cc.
int32_t draw_token(const float* logits, int64_t vocab, Token last, uint64_t seed, uint64_t counter);

}  // namespace octet::cpu

// cpu/row_scan.h   Passes over a row of logits that stop only where something is high enough.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../common/vec.h"

namespace octet::cpu {

constexpr float kNever = -std::numeric_limits<float>::infinity();  // the logit of what may not be chosen
constexpr int64_t kScanBlock = 64;                                 // logits of one look
constexpr int64_t kStretch = 4096;  // logits of one task; half of a first-level cache

// -inf where there are none, and where all are NaN.
inline float highest_of(const float* logits, int64_t size) {
  F32x16 highest = broadcast(kNever);
  const int64_t whole = size / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) highest = max(load(logits + i), highest);
  float result = max_lane(highest);
  for (int64_t i = whole; i < size; ++i) result = std::max(result, logits[i]);
  return result;
}

// body(begin, end) for the blocks of [0, vocab) in which a logit reaches least(), asked before each block.
template <class Least, class Body>
void blocks_reaching(const float* logits, int64_t vocab, Least least, Body body) {
  for (int64_t begin = 0; begin < vocab; begin += kScanBlock) {
    const int64_t end = std::min(vocab, begin + kScanBlock);
    const float highest = highest_of(logits + begin, end - begin);
    if (highest >= least() && highest > kNever) body(begin, end);
  }
}

}  // namespace octet::cpu

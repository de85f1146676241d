// cpu/cutoff.h   The last token that top-k and top-p leave, found without sorting the vocabulary.
//
// Tokens are ordered by logit, then by lowest id, so "the best k" and "the smallest set that holds mass p"
// are exact sets, and the last token of such a set tells all of it. Each function narrows the vocabulary to
// a few candidates in passes of sixteen lanes and selects among these in linear time.

#pragma once

#include <cstdint>

namespace octet::cpu {

struct Token {
  float logit;
  int32_t id;
};

inline bool is_better(const Token& a, const Token& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// The last of the best tokens of logits [vocab] that a row may choose, of which at least one is above -inf.
//
// highest   the highest of the logits
// top_k     so many at most; 0 for any number
// top_p     the smallest set that holds so much of the mass of what top_k leaves, at least one; 1 for all
Token last_kept(const float* logits, int64_t vocab, float highest, int64_t top_k, float top_p);

}  // namespace octet::cpu

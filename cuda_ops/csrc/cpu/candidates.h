// cpu/candidates.h   The tokens that top-k and top-p leave, found without sorting the vocabulary.
//
// Tokens are ordered by logit, then by lowest id, so "the best k" and "the smallest set that holds mass p"
// are exact sets. Both functions first drop tokens that provably cannot belong, then select in linear time.

#pragma once

#include <cstdint>
#include <vector>

namespace octet::cpu {

struct Candidate {
  float logit;
  float weight;  // e^(logit - highest logit)
  int32_t id;
};

inline bool is_better(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// The k best of logits [vocab] (fewer where fewer are above -inf), in no particular order.
void keep_top_k(const float* logits, int64_t vocab, float highest, int64_t k, std::vector<Candidate>& out);

// All that may belong to the smallest set with `top_p` of the softmax mass, which may be a few more;
// returns the mass of the whole vocabulary in units of `weight`.
double keep_likely(const float* logits, int64_t vocab, float highest, float top_p,
                   std::vector<Candidate>& out);

// Shortens `all` to the smallest set of best candidates whose weights reach `mass`; at least one stays.
void keep_mass(std::vector<Candidate>& all, double mass);

}  // namespace octet::cpu

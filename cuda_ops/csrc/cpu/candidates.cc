// cpu/candidates.cc   Selection in linear time; see candidates.h.

#include "candidates.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/vec_math.h"

namespace octet::cpu {
namespace {

// A value that at least k logits reach: the k-th highest of the maxima of as many stretches as there are.
float reached_by(const float* logits, int64_t vocab, int64_t k) {
  constexpr int64_t kStretch = 64;
  if (k > vocab / kStretch) return -std::numeric_limits<float>::infinity();
  std::vector<float> maxima;
  maxima.reserve(size_t(ceil_div(vocab, kStretch)));
  for (int64_t i = 0; i < vocab; i += kStretch) {
    maxima.push_back(*std::max_element(logits + i, logits + std::min(vocab, i + kStretch)));
  }
  std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<float>());
  return maxima[size_t(k - 1)];
}

void collect(const float* logits, int64_t vocab, float highest, float at_least, std::vector<Candidate>& out) {
  out.clear();
  for (int64_t i = 0; i < vocab; ++i) {
    if (logits[i] >= at_least && logits[i] > -std::numeric_limits<float>::infinity()) {
      out.push_back({logits[i], exp_one(logits[i] - highest), int32_t(i)});
    }
  }
}

Candidate median(const Candidate& a, const Candidate& b, const Candidate& c) {
  if (is_better(a, b)) return is_better(b, c) ? b : is_better(a, c) ? c : a;
  return is_better(a, c) ? a : is_better(b, c) ? c : b;
}

}  // namespace

void keep_top_k(const float* logits, int64_t vocab, float highest, int64_t k, std::vector<Candidate>& out) {
  collect(logits, vocab, highest, reached_by(logits, vocab, k), out);
  if (int64_t(out.size()) <= k) return;
  std::nth_element(out.begin(), out.begin() + (k - 1), out.end(), is_better);
  out.resize(size_t(k));
}

double keep_likely(const float* logits, int64_t vocab, float highest, float top_p,
                   std::vector<Candidate>& out) {
  F32x16 sums = zeros();
  by_sixteen(vocab, [&](int64_t i, int64_t n) {
    F32x16 weights = exp(load_upto(logits + i, n) - broadcast(highest));
    if (n < 16) {
      float lanes[16];
      store(lanes, weights);
      weights = load_first(lanes, n);
    }
    sums = sums + weights;
  });
  const double total = sum(sums);
  // Tokens of weight below (1 - p) * total / vocab hold less than 1 - p together: the set ends above them.
  const double least = 0.5 * (1.0 - double(top_p)) * total / double(vocab);
  collect(logits, vocab, highest, highest + float(std::log(least)), out);
  return total;
}

void keep_mass(std::vector<Candidate>& all, double mass) {
  constexpr int64_t kFew = 32;
  mass = std::max(mass, std::numeric_limits<double>::min());  // so that the best one always stays
  auto begin = all.begin(), end = all.end();                  // before `begin`: kept; from `end` on: dropped
  while (end - begin > kFew && mass > 0.0) {
    const Candidate pivot = median(*begin, *(begin + (end - begin) / 2), *(end - 1));
    const auto better = std::partition(begin, end, [&](const Candidate& c) { return is_better(c, pivot); });
    double held = 0.0;
    for (auto it = begin; it != better; ++it) held += it->weight;
    if (held >= mass) {
      end = better;
      continue;
    }
    std::iter_swap(better, std::find_if(better, end, [&](const Candidate& c) { return c.id == pivot.id; }));
    mass -= held + pivot.weight;  // all better ones are kept, and the pivot after them
    begin = better + 1;
  }
  std::sort(begin, end, is_better);
  for (; begin != end && mass > 0.0; ++begin) mass -= begin->weight;
  all.resize(size_t(begin - all.begin()));
}

}  // namespace octet::cpu

// cpu/cutoff.cc   Selection in linear time; see cutoff.h.
//
//   top_k   k logits reach the k-th highest of the maxima of blocks: they are the candidates
//   top_p   mass(t) = sum of e^(logit - highest) over logits >= t; the interval in which mass(t) passes p of
//           the whole is cut in four until few logits are in it: they are the candidates
//   order   mass(t): 16 sums (id mod 16) and the tree of vec.h; candidates in the order of a selection that
//           depends on them alone

#include "cutoff.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/scratch.h"
#include "../common/vec_math.h"
#include "row_scan.h"

namespace octet::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr Token kAll{kNever, std::numeric_limits<int32_t>::max()};

struct Candidate : Token {
  float weight;  // e^(logit - highest logit)
};
using Candidates = std::vector<Candidate>;

// Whether one of kScanBlock logits is in [least, below).
bool has_any(const float* logits, float least, float below) {
  F32x16 highest = broadcast(kNever);
  for (int64_t i = 0; i < kScanBlock; i += 16) {
    const F32x16 row = load(logits + i);
    highest = max(select_less(row, broadcast(below), row, broadcast(kNever)), highest);
  }
  return max_lane(highest) >= least;
}

// Those in [least, below) but for -inf, in the order of their ids.
template <class WeightOf>
void collect(const float* logits, int64_t vocab, float least, float below, WeightOf weight_of,
             Candidates& out) {
  out.clear();
  least = std::max(least, std::numeric_limits<float>::lowest());
  for (int64_t begin = 0; begin < vocab; begin += kScanBlock) {
    const int64_t size = std::min(kScanBlock, vocab - begin);
    if (size == kScanBlock && !has_any(logits + begin, least, below)) continue;
    int64_t found[kScanBlock], count = 0;
    for (int64_t i = begin; i < begin + size; ++i) {  // without a branch that nobody can foresee
      found[count] = i;
      count += (logits[i] >= least) & (logits[i] < below);
    }
    for (int64_t j = 0; j < count; ++j)
      out.push_back({{logits[found[j]], int32_t(found[j])}, weight_of(found[j])});
  }
}

Token last_of(const Candidates& all) {
  return *std::max_element(all.begin(), all.end(), is_better);
}

// --- top-k -----------------------------------------------------------------------------------------------

// A value that at least k logits reach: the k-th highest of the maxima of as many blocks as there are.
float reached_by(const float* logits, int64_t vocab, int64_t k) {
  if (k > vocab / kScanBlock) return kNever;
  std::vector<float> maxima;
  maxima.reserve(size_t(ceil_div(vocab, kScanBlock)));
  for (int64_t i = 0; i < vocab; i += kScanBlock) {
    maxima.push_back(highest_of(logits + i, std::min(kScanBlock, vocab - i)));
  }
  std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<float>());
  return maxima[size_t(k - 1)];
}

void keep_top_k(const float* logits, int64_t vocab, float highest, int64_t k, Candidates& out) {
  const auto weight_of = [&](int64_t i) { return exp_one(logits[i] - highest); };
  collect(logits, vocab, reached_by(logits, vocab, k), kInfinity, weight_of, out);
  if (int64_t(out.size()) <= k) return;
  std::nth_element(out.begin(), out.begin() + (k - 1), out.end(), is_better);
  out.resize(size_t(k));
}

// --- top-p -----------------------------------------------------------------------------------------------

Candidate median(const Candidate& a, const Candidate& b, const Candidate& c) {
  if (is_better(a, b)) return is_better(b, c) ? b : is_better(a, c) ? c : a;
  return is_better(a, c) ? a : is_better(b, c) ? c : b;
}

// Shortens `all` to the smallest set of best candidates whose weights reach `mass`; at least one stays.
void keep_mass(Candidates& all, double mass) {
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

// weights[i] = e^(logits[i] - highest); returns their sum.
double weigh(const float* logits, int64_t vocab, float highest, float* weights) {
  F32x16 sums = zeros();
  by_sixteen(vocab, [&](int64_t i, int64_t n) {
    store_upto(weights + i, exp(load_upto(logits + i, n) - broadcast(highest)), n);
    sums = sums + load_upto(weights + i, n);
  });
  return sum(sums);
}

// The logits that reach a value.
struct Reach {
  float least;
  double mass, count;
};

constexpr int kCuts = 3;  // values that one pass looks at

void measure(const float* logits, const float* weights, int64_t vocab, Reach (&cuts)[kCuts]) {
  F32x16 sums[kCuts], counts[kCuts];
  for (int j = 0; j < kCuts; ++j) sums[j] = counts[j] = zeros();
  by_sixteen(vocab, [&](int64_t i, int64_t n) {
    const F32x16 row = load_upto(logits + i, n), weight = load_upto(weights + i, n);
    const F32x16 one = broadcast(n == 16 ? 1.0f : 0.0f);  // the last few do not matter to a count
    for (int j = 0; j < kCuts; ++j) {
      sums[j] = sums[j] + select_less(row, broadcast(cuts[j].least), zeros(), weight);
      counts[j] = counts[j] + select_less(row, broadcast(cuts[j].least), zeros(), one);
    }
  });
  for (int j = 0; j < kCuts; ++j) {
    cuts[j].mass = sum(sums[j]);
    cuts[j].count = sum(counts[j]);
  }
}

// Finds an interval of logits in which the mass of those above passes `mass`; its tokens are left in `out`.
// Returns how much of `mass` they have to hold.
double narrow_to_mass(const float* logits, const float* weights, int64_t vocab, float highest, double mass,
                      float lowest, Candidates& out) {
  constexpr int kMostPasses = 8;
  constexpr double kFew = 512;
  Reach enough{kNever, 0, double(vocab)}, few{kInfinity, 0, 0};
  for (int i = 0; i < kMostPasses && enough.count - few.count > kFew; ++i) {
    const float from = i == 0 ? lowest : enough.least, to = std::min(few.least, highest);
    if (from == kNever || from >= to) break;  // not enough above `lowest`, or nothing in between
    Reach cuts[kCuts];
    for (int j = 0; j < kCuts; ++j) cuts[j].least = from + (to - from) * (float(j + (i != 0)) / (kCuts + 1));
    measure(logits, weights, vocab, cuts);
    for (const Reach& cut : cuts) {
      if (cut.mass >= mass) {
        if (cut.least > enough.least) enough = cut;
      } else if (cut.least < few.least) {
        few = cut;
      }
    }
  }
  collect(logits, vocab, enough.least, few.least, [&](int64_t i) { return weights[i]; }, out);
  return mass - few.mass;
}

void keep_top_p(const float* logits, int64_t vocab, float highest, float top_p, Candidates& out) {
  float* weights = scratch<float>(Slot::weights, size_t(vocab));
  const double total = weigh(logits, vocab, highest, weights);
  // Tokens of weight below (1 - p) * total / vocab hold less than 1 - p together: the set ends above them.
  const double least = 0.5 * (1.0 - double(top_p)) * total / double(vocab);
  const float lowest = highest + float(std::log(least));
  keep_mass(out, narrow_to_mass(logits, weights, vocab, highest, double(top_p) * total, lowest, out));
}

}  // namespace

Token last_kept(const float* logits, int64_t vocab, float highest, int64_t top_k, float top_p) {
  thread_local Candidates kept;
  const bool has_top_k = top_k > 0 && top_k < vocab;
  if (has_top_k) {
    keep_top_k(logits, vocab, highest, top_k, kept);
    double total = 0.0;
    for (const Candidate& c : kept) total += c.weight;
    if (top_p < 1.0f) keep_mass(kept, double(top_p) * total);
  } else if (top_p < 1.0f) {
    keep_top_p(logits, vocab, highest, top_p, kept);
  } else {
    return kAll;
  }
  return last_of(kept);
}

}  // namespace octet::cpu

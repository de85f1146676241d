// cpu/sampling.cc   The next token of every row.
//
//   logits [S, V] fp32, overwritten   ->   token_ids, logprobs [S], top_ids, top_logprobs [S, n]
//
//   bytes   a few passes over the row   -> V = 103,424 stays in the second-level cache
//   map     stretches of all rows over threads for the log-sum-exp, then rows over threads
//   order   log-sum-exp = per stretch of kStretch ids 16 sums (id mod 16) and the tree of vec.h, stretches
//           ascending; a row depends on its own inputs alone
//   noise   Gumbel(seed, counter, id) = -log(-log(1 - u)), u = (word + 0.5) / 2^32, word = number id % 4 of
//           Philox4x32-10 with key = seed and counter words (counter low, counter high, id / 4, 0)
//   source  Gumbel-max: Maddison et al. 2014, arXiv:1411.0030; min-p: Nguyen et al. 2024, arXiv:2407.01082

#include "../include/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/philox.h"
#include "../common/scratch.h"
#include "../common/thread_pool.h"
#include "../common/vec_math.h"
#include "candidates.h"

namespace octet::cpu {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr float kGreedyBelow = 1e-5f;  // a lower temperature is greedy: logits divided by it would overflow

// --- the distribution the model gave ---------------------------------------------------------------------

constexpr int64_t kStretch = 4096;  // ids; half of a first-level cache

// Never lets [begin, end) of a row be chosen where its bit is not set; begin is a multiple of 32.
void forbid(float* logits, int64_t begin, int64_t end, const int32_t* allowed_bits) {
  for (int64_t first = begin; first < end; first += 32) {
    const uint32_t bits = uint32_t(allowed_bits[first / 32]);
    if (bits == 0xffffffffu) continue;
    for (int64_t i = first; i < std::min(end, first + 32); ++i) {
      if (!(bits >> (i % 32) & 1u)) logits[i] = kNever;
    }
  }
}

float highest_of(const float* logits, int64_t size) {
  F32x16 highest = broadcast(kNever);
  const int64_t whole = size / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) highest = max(highest, load(logits + i));
  float result = max_lane(highest);
  for (int64_t i = whole; i < size; ++i) result = std::max(result, logits[i]);
  return result;
}

// What the choice has to know of some logits: the highest, and the sum of e^(logit - highest).
struct Mass {
  float highest, total;  // total is NaN where a logit is NaN or +inf
};

Mass mass_of(const float* logits, int64_t size) {
  const float highest = highest_of(logits, size);
  const float origin = highest == kNever ? 0.0f : highest;  // of nothing but forbidden ones and NaN
  F32x16 sums = zeros();
  const int64_t whole = size / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) sums = sums + exp(load(logits + i) - broadcast(origin));
  float total = sum(sums);
  for (int64_t i = whole; i < size; ++i) total += exp_one(logits[i] - origin);
  return {highest, total};
}

Mass mass_of(const Mass* stretches, int64_t count) {
  Mass all{kNever, 0.0f};
  for (int64_t i = 0; i < count; ++i) all.highest = std::max(all.highest, stretches[i].highest);
  for (int64_t i = 0; i < count; ++i) {
    const Mass& one = stretches[i];
    all.total += one.highest == kNever ? one.total : one.total * exp_one(one.highest - all.highest);
  }
  return all;
}

// The n best tokens in order: one pass that keeps a short sorted list.
void find_top(const float* logits, int64_t vocab, float log_total, int64_t n, int32_t* ids, float* logprobs) {
  if (n == 0) return;
  std::vector<std::pair<float, int32_t>> best(size_t(n), {kNever, -1});
  for (int64_t i = 0; i < vocab; ++i) {
    if (!(logits[i] > best.back().first)) continue;
    size_t at = best.size() - 1;
    for (; at > 0 && logits[i] > best[at - 1].first; --at) best[at] = best[at - 1];
    best[at] = {logits[i], int32_t(i)};
  }
  for (int64_t j = 0; j < n; ++j) {
    ids[j] = best[size_t(j)].second;
    logprobs[j] = best[size_t(j)].first - log_total;
  }
}

// --- what the request changes in it ----------------------------------------------------------------------

// Logits that were changed, so that the chosen token's own log-probability can still be told.
using Changes = std::vector<std::pair<int32_t, float>>;

float penalised(float logit, int32_t num_outputs, float repetition, float presence, float frequency) {
  logit = logit > 0.0f ? logit / repetition : logit * repetition;
  if (num_outputs > 0) logit -= presence + frequency * float(num_outputs);
  return logit;
}

void apply_penalties(float* logits, const SamplingBatch& batch, int64_t row, Changes& changes) {
  const float repetition = batch.repetition[row], presence = batch.presence[row];
  const float frequency = batch.frequency[row];
  if (repetition == 1.0f && presence == 0.0f && frequency == 0.0f) return;
  thread_local std::vector<int32_t> counts;  // per id: 1 if it occurs, plus 2 per occurrence in the output
  counts.resize(std::max(counts.size(), size_t(batch.vocab)));
  const int32_t begin = batch.history_starts[row], end = batch.history_starts[row + 1];
  for (int32_t i = begin; i < end; ++i) {
    const int32_t id = batch.history[i];
    if (counts[size_t(id)] == 0) changes.push_back({id, logits[id]});
    counts[size_t(id)] |= 1;
    if (i - begin >= batch.num_prompt_tokens[row]) counts[size_t(id)] += 2;
  }
  for (const auto& [id, original] : changes) {
    logits[id] = penalised(original, counts[size_t(id)] / 2, repetition, presence, frequency);
    counts[size_t(id)] = 0;
  }
}

void ban(float* logits, const SamplingBatch& batch, int64_t row) {
  for (int32_t i = batch.banned_starts[row]; i < batch.banned_starts[row + 1]; ++i) {
    logits[batch.banned[i]] = kNever;
  }
}

// --- the choice ------------------------------------------------------------------------------------------

// `stretches` of the row before it was changed say where to look in one that was not.
int32_t lowest_id_of(float highest, const float* logits, int64_t vocab, const Mass* stretches) {
  int64_t begin = 0;
  if (stretches) {
    while (stretches[begin / kStretch].highest != highest) begin += kStretch;
  }
  return int32_t(std::find(logits + begin, logits + vocab, highest) - logits);
}

// Keeps the token with the highest logit + noise; equal sums go to the lowest id.
class NoisyBest {
 public:
  NoisyBest(uint64_t seed, uint64_t counter) : seed_(seed), counter_(counter) {}

  Philox words_of(int64_t four) const {
    return philox(seed_, {{uint32_t(counter_), uint32_t(counter_ >> 32), uint32_t(four), 0}});
  }

  void offer(int32_t id, float logit, uint32_t word) {
    // u >= word / 2^32 and -log(1 - u) >= u bound the noise by -log(u); most tokens end here.
    const double bound = 0.6931471806 * (2 + __builtin_clz(word | 1u));
    if (double(logit) + bound < sum_) return;
    const double u = (double(word) + 0.5) * 0x1p-32;
    const double sum = double(logit) - std::log(-std::log1p(-u));
    if (sum > sum_ || (sum == sum_ && id < id_)) {
      sum_ = sum;
      id_ = id;
    }
  }

  bool can_win(float logit) const { return double(logit) + 23.0 >= sum_; }  // no noise reaches 23
  int32_t id() const { return id_; }

 private:
  const uint64_t seed_, counter_;
  double sum_ = -std::numeric_limits<double>::infinity();
  int32_t id_ = -1;
};

void offer_all(const float* logits, int64_t vocab, float at_least, NoisyBest& best) {
  for (int64_t first = 0; first < vocab; first += 4) {
    const int64_t end = std::min(vocab, first + 4);
    const float highest = *std::max_element(logits + first, logits + end);
    if (highest < at_least || highest == kNever || !best.can_win(highest)) continue;
    const Philox words = best.words_of(first / 4);
    for (int64_t i = first; i < end; ++i) {
      if (logits[i] >= at_least && logits[i] > kNever)
        best.offer(int32_t(i), logits[i], words.word[i - first]);
    }
  }
}

// logits / temperature in scratch; `highest` is divided alike.
const float* cooled(const float* logits, int64_t vocab, F32x16 temperature, float& highest) {
  float* out = scratch<float>(Slot::sampling, size_t(vocab));
  by_sixteen(vocab,
             [&](int64_t i, int64_t n) { store_upto(out + i, load_upto(logits + i, n) / temperature, n); });
  float lanes[16];
  store(lanes, broadcast(highest) / temperature);
  highest = lanes[0];
  return out;
}

int32_t draw(const float* raw, const SamplingBatch& batch, int64_t row, float highest) {
  const int64_t vocab = batch.vocab;
  const float* logits = cooled(raw, vocab, broadcast(batch.temperature[row]), highest);
  NoisyBest best(uint64_t(batch.seeds[row]), uint64_t(batch.counters[row]));
  const float top_p = batch.top_p[row], min_p = batch.min_p[row];
  const int64_t top_k = batch.top_k[row];
  const bool has_top_k = top_k > 0 && top_k < vocab;
  if (!has_top_k && top_p >= 1.0f) {
    offer_all(logits, vocab, min_p > 0.0f ? highest + std::log(min_p) : kNever, best);
    return best.id();
  }
  thread_local std::vector<Candidate> kept;
  double total = 0.0;
  if (has_top_k) {
    keep_top_k(logits, vocab, highest, top_k, kept);
    for (const Candidate& c : kept) total += c.weight;
  } else {
    total = keep_likely(logits, vocab, highest, top_p, kept);
  }
  if (top_p < 1.0f) keep_mass(kept, double(top_p) * total);
  for (const Candidate& c : kept) {
    if (c.weight >= min_p) best.offer(c.id, c.logit, best.words_of(c.id / 4).word[c.id % 4]);
  }
  return best.id();
}

float original_logit(const float* logits, const Changes& changes, int32_t id) {
  for (const auto& [changed, original] : changes) {
    if (changed == id) return original;
  }
  return logits[id];
}

// `stretches` of the row, whose forbidden ids are forbidden.
void sample_row(float* logits, const Mass* stretches, const SamplingBatch& batch, int64_t row,
                const SamplingResult& result) {
  const int64_t vocab = batch.vocab, n = result.num_top;
  const Mass all = mass_of(stretches, ceil_div(vocab, kStretch));
  const float log_total = all.highest + std::log(all.total);
  find_top(logits, vocab, log_total, n, result.top_ids + row * n, result.top_logprobs + row * n);
  result.token_ids[row] = -1;
  result.logprobs[row] = kNever;
  if (!std::isfinite(log_total)) return;

  thread_local Changes changes;
  changes.clear();
  apply_penalties(logits, batch, row, changes);
  ban(logits, batch, row);
  if (batch.row_bits) forbid(logits, 0, vocab, batch.row_bits + row * ((vocab + 31) / 32));
  const bool has_bans = batch.banned_starts[row] < batch.banned_starts[row + 1] || batch.row_bits;
  const bool is_changed = has_bans || !changes.empty();
  const float highest = is_changed ? highest_of(logits, vocab) : all.highest;
  if (highest == kNever) return;
  const int32_t id = batch.temperature[row] < kGreedyBelow
                         ? lowest_id_of(highest, logits, vocab, is_changed ? nullptr : stretches)
                         : draw(logits, batch, row, highest);
  if (id < 0 || id >= vocab) return;
  result.token_ids[row] = id;
  result.logprobs[row] = original_logit(logits, changes, id) - log_total;
}

Status check_ids(const int32_t* starts, int64_t num_rows, const int32_t* ids, int64_t vocab,
                 Status otherwise) {
  if (starts[0] != 0) return otherwise;
  for (int64_t row = 0; row < num_rows; ++row) {
    if (starts[row] > starts[row + 1]) return otherwise;
  }
  for (int64_t i = 0; i < starts[num_rows]; ++i) {
    if (ids[i] < 0 || ids[i] >= vocab) return otherwise;
  }
  return nullptr;
}

}  // namespace

Status sample_tokens(float* logits, const SamplingBatch& batch, const SamplingResult& result) {
  if (Status wrong = check_ids(batch.history_starts, batch.num_rows, batch.history, batch.vocab,
                               "history_starts must ascend from 0 and history hold ids below V")) {
    return wrong;
  }
  if (Status wrong = check_ids(batch.banned_starts, batch.num_rows, batch.banned, batch.vocab,
                               "banned_starts must ascend from 0 and banned hold ids below V")) {
    return wrong;
  }
  const int64_t vocab = batch.vocab, per_row = ceil_div(vocab, kStretch);
  Mass* stretches = scratch<Mass>(Slot::stretches, size_t(batch.num_rows * per_row));
  parallel_for(batch.num_rows * per_row, [&](int64_t i) {
    float* row = logits + i / per_row * vocab;
    const int64_t begin = i % per_row * kStretch, end = std::min(vocab, begin + kStretch);
    forbid(row, begin, end, batch.allowed_bits);
    stretches[i] = mass_of(row + begin, end - begin);
  });
  parallel_for(batch.num_rows, [&](int64_t row) {
    sample_row(logits + row * vocab, stretches + row * per_row, batch, row, result);
  });
  return nullptr;
}

}  // namespace octet::cpu

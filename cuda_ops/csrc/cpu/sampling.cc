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

#include "../common/scratch.h"
#include "../common/thread_pool.h"
#include "../common/vec_math.h"
#include "cutoff.h"
#include "draw.h"
#include "row_scan.h"

namespace octet::cpu {
namespace {

constexpr float kGreedyBelow = 1e-5f;  // a lower temperature is greedy: logits divided by it would overflow

// --- the distribution the model gave ---------------------------------------------------------------------

// Never lets [begin, end) of a row be chosen where its bit is not set; begin is a multiple of 32.
void forbid(float* logits, int64_t begin, int64_t end, const int32_t* allowed_bits) {
  for (int64_t first = begin; first < end; first += 32) {
    const uint32_t bits = uint32_t(allowed_bits[first / 32]);
    if (bits == 0xffffffffu) continue;
    for (int64_t i = first; i < std::min(end, first + 32); ++i) {
      logits[i] = bits >> (i % 32) & 1u ? logits[i] : kNever;
    }
  }
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
  std::vector<Token> best(size_t(n), {kNever, -1});
  const auto offer = [&](const Token& token) {
    if (!(token.logit > best.back().logit)) return;
    size_t at = best.size() - 1;
    for (; at > 0 && token.logit > best[at - 1].logit; --at) best[at] = best[at - 1];
    best[at] = token;
  };
  blocks_reaching(
      logits, vocab, [&] { return best.back().logit; },
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) offer({logits[i], int32_t(i)});
      });
  for (int64_t j = 0; j < n; ++j) {
    ids[j] = best[size_t(j)].id;
    logprobs[j] = best[size_t(j)].logit - log_total;
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
  const float* logits = cooled(raw, batch.vocab, broadcast(batch.temperature[row]), highest);
  Token last = last_kept(logits, batch.vocab, highest, batch.top_k[row], batch.top_p[row]);
  if (batch.min_p[row] > 0.0f) {
    const Token likely{highest + std::log(batch.min_p[row]), std::numeric_limits<int32_t>::max()};
    if (is_better(likely, last)) last = likely;
  }
  return draw_token(logits, batch.vocab, last, uint64_t(batch.seeds[row]), uint64_t(batch.counters[row]));
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

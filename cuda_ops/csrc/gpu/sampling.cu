// gpu/sampling.cu   The next token of every row, and its log-probabilities
//
//   logits [S, V] fp32, disallowed ids become -inf -> token_ids, logprobs [S], top_ids, top_logprobs [S, n]
//   steps   allowed ids, log-softmax, penalties, bans and row bits, temperature, top-k, top-p, min-p,
//           choice
//
//   bytes   4 V per row and pass: three passes for a plain draw, seven more for top-k, as many for top-p. A
//           row (414 KB at V = 103,424) stays in L2, so a pass is bound by what one SM takes from it
//   map     one block of 512 threads per row
//   needs   V < 2^23; ids of history and banned below V; a workspace of V counts per row; S may be 0
//   order   log-sum-exp: thread t sums ids t, t + 512, ... then the tree of block_sum; selections add
//           integers (selection.cuh); a row depends on its own inputs alone
//   noise   Gumbel(seed, counter, id) = -log(-log(1 - u)), u = (word + 0.5) / 2^32, word = number id % 4 of
//           Philox4x32-10 with key = seed and counter words (counter low, counter high, id / 4, 0): the
//           twin's words, in fp32
//   source  Gumbel-max: Maddison et al. 2014, arXiv:1411.0030; min-p: Nguyen et al. 2024, arXiv:2407.01082;
//           Salmon et al. 2011 (Philox)                           twin  cpu/sampling.cc
//   speed   not yet measured

#include "launchers.h"
#include "selection.cuh"

namespace octet::gpu {
namespace {

constexpr int kThreads = kSampleThreads;
constexpr float kGreedyBelow = 1e-5f;                 // as the twin
constexpr uint32_t kSeen = 1, kBanned = 0x80000000u;  // in a count; each output occurrence adds 2

struct Philox4 {
  uint32_t word[4];
};

__device__ Philox4 philox(uint64_t key, uint64_t counter, uint32_t four) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  Philox4 c{{uint32_t(counter), uint32_t(counter >> 32), four, 0}};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t a_high = __umulhi(0xD2511F53u, c.word[0]), a_low = 0xD2511F53u * c.word[0];
    const uint32_t b_high = __umulhi(0xCD9E8D57u, c.word[2]), b_low = 0xCD9E8D57u * c.word[2];
    c = {{b_high ^ c.word[1] ^ k0, b_low, a_high ^ c.word[3] ^ k1, a_low}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Each half of u keeps its digits where the double logarithm needs them.
__device__ float gumbel(uint32_t word) {
  const float u = (float(word) + 0.5f) * 0x1p-32f, rest = (float(~word) + 0.5f) * 0x1p-32f;
  return -logf(word >> 31 ? -logf(rest) : -log1pf(-u));
}

// The logits of one row with the request's changes, made anew at every look.
struct Row {
  const float* logits;
  const uint32_t* counts;  // [V], null if nothing is counted
  const int32_t* bits;     // [V / 32], what this row may choose; null: everything
  float repetition, presence, frequency, temperature;

  __device__ float changed(int id) const {
    float logit = logits[id];
    if (bits && !(uint32_t(bits[id / 32]) >> (id % 32) & 1u)) return -INFINITY;
    if (!counts) return logit;
    const uint32_t count = counts[id];
    if (count & kBanned) return -INFINITY;
    if (count == 0) return logit;
    logit = logit > 0 ? logit / repetition : logit * repetition;
    return count > kSeen ? logit - (presence + frequency * float(count / 2)) : logit;
  }
  __device__ float cooled(int id) const { return changed(id) / temperature; }
};

struct Best {
  float score;
  int id;
};
__device__ __forceinline__ Best better(const Best& a, const Best& b) {
  return b.score > a.score || (b.score == a.score && b.id < a.id) ? b : a;
}

// The block's best, the same for every thread.
__device__ Best block_best(Best best) {
  OCTET_SHARED(Best, parts, kThreads / 32);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    best = better(
        best, {__shfl_xor_sync(0xffffffffu, best.score, step), __shfl_xor_sync(0xffffffffu, best.id, step)});
  }
  __syncthreads();  // an earlier call's readers are done
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = best;
  __syncthreads();
  for (int warp = 0; warp < kThreads / 32; ++warp) best = better(best, parts[warp]);
  return best;
}

constexpr int kNoToken = 0x7fffffff;

// Sets disallowed ids to -inf; returns the best of the rest.
__device__ Best forbid(float* logits, int vocab, const int32_t* allowed_bits) {
  Best best{-INFINITY, kNoToken};
  for (int id = threadIdx.x; id < vocab; id += kThreads) {
    if (!(uint32_t(allowed_bits[id / 32]) >> (id % 32) & 1u)) {
      logits[id] = -INFINITY;
    } else {
      best = better(best, {logits[id], id});
    }
  }
  return block_best(best);
}

__device__ float log_sum_exp(const float* logits, int vocab, float highest) {
  float sum = 0;
  for (int id = threadIdx.x; id < vocab; id += kThreads) sum += expf(logits[id] - highest);
  return highest + logf(block_sum<kThreads>(sum));
}

// A score that at least `count` tokens reach: the count-th best of the threads' own maxima.
template <class Score>
__device__ float reached_by(int vocab, int64_t count, Score score, float* maxima) {
  if (count > kThreads) return -INFINITY;
  float own = -INFINITY;
  for (int id = threadIdx.x; id < vocab; id += kThreads) own = fmaxf(own, score(id));
  __syncthreads();
  maxima[threadIdx.x] = own;
  __syncthreads();
  int num_better = 0;
  for (int i = 0; i < kThreads; ++i)
    num_better += maxima[i] > own || (maxima[i] == own && i < int(threadIdx.x));
  __syncthreads();
  if (num_better == count - 1) maxima[0] = own;
  __syncthreads();
  return maxima[0];
}

// The n best ids in order: selected, then each counts how many of the others are better.
__device__ void write_top(const SelectionScratch& scratch, const float* logits, int vocab, float log_total,
                          int n, int32_t* ids, float* logprobs, float* maxima) {
  OCTET_SHARED(int, num_found, 1);
  OCTET_SHARED(Best, found, kThreads);
  const auto score = [&](int id) { return logits[id]; };
  const float bound = reached_by(vocab, n, score, maxima);
  const Kept kept = keep_best(scratch, vocab, Kept{}, bound, Mass(n), score, [](float) { return Mass(1); });
  if (threadIdx.x == 0) num_found[0] = 0;
  __syncthreads();
  for (int id = threadIdx.x; id < vocab; id += kThreads) {
    const float logit = logits[id];
    if (logit > -INFINITY && kept.has(logit, id)) found[atomicAdd(num_found, 1)] = {logit, id};
  }
  __syncthreads();
  const int count = num_found[0];
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const Best own = i < count ? found[i] : Best{-INFINITY, -1};
    int place = i < count ? 0 : i;
    for (int other = 0; i < count && other < count; ++other) {
      place += found[other].id != own.id && better(own, found[other]).id != own.id;
    }
    ids[place] = own.id;
    logprobs[place] = own.score - log_total;
  }
}

// Counts of the row's history and bans; null where nothing is changed.
__device__ const uint32_t* count_changes(const SamplingBatch& b, int row, uint32_t* counts) {
  const int begin = b.history_starts[row], end = b.history_starts[row + 1];
  const int ban_begin = b.banned_starts[row], ban_end = b.banned_starts[row + 1];
  const bool has_penalty = b.repetition[row] != 1 || b.presence[row] != 0 || b.frequency[row] != 0;
  if ((!has_penalty || begin == end) && ban_begin == ban_end) return nullptr;
  for (int id = threadIdx.x; id < int(b.vocab); id += kThreads) counts[id] = 0;
  __syncthreads();
  for (int i = begin + threadIdx.x; has_penalty && i < end; i += kThreads) {
    if (i - begin >= b.num_prompt_tokens[row]) {
      atomicAdd(&counts[b.history[i]], 2u);
    } else {
      atomicOr(&counts[b.history[i]], kSeen);
    }
  }
  for (int i = ban_begin + threadIdx.x; i < ban_end; i += kThreads) atomicOr(&counts[b.banned[i]], kBanned);
  __syncthreads();
  return counts;
}

// What top-k and top-p leave of the row.
__device__ Kept kept_tokens(const SelectionScratch& scratch, const SamplingBatch& b, int row,
                            const Row& tokens, float highest, float* maxima) {
  const int vocab = int(b.vocab), top_k = b.top_k[row];
  const float top_p = b.top_p[row];
  const auto score = [&](int id) { return tokens.cooled(id); };
  const auto weight = [=](float y) { return Mass(expf(y - highest) * kMassOfOne); };
  Kept kept;
  float bound = -INFINITY;
  if (top_k > 0 && top_k < vocab) {
    bound = reached_by(vocab, top_k, score, maxima);
    kept = keep_best(scratch, vocab, kept, bound, Mass(top_k), score, [](float) { return Mass(1); });
  }
  if (!(top_p < 1)) return kept;
  OCTET_SHARED(Mass, total, 1);
  if (threadIdx.x == 0) total[0] = 0;
  __syncthreads();
  Mass own = 0;
  for (int id = threadIdx.x; id < vocab; id += kThreads) {
    const float y = score(id);
    if (y >= bound && y > -INFINITY && kept.has(y, id)) own += weight(y);
  }
  atomicAdd(total, own);
  __syncthreads();
  const double mass = double(fmaxf(top_p, 0)) * double(total[0]);
  const Mass target = mass < 1 ? 1 : Mass(mass);
  // Tokens of less than (1 - p) / V of the mass hold less than 1 - p together: the set ends above them.
  const float least = 0.5f * (1 - top_p) * (float(total[0]) / kMassOfOne) / float(vocab);
  return keep_best(scratch, vocab, kept, fmaxf(bound, highest + logf(least)), target, score, weight);
}

__device__ int draw(const SelectionScratch& scratch, const SamplingBatch& b, int row, Row& tokens,
                    const Best& best, float* maxima) {
  tokens.temperature = b.temperature[row];
  const float highest = best.score / tokens.temperature;
  const Kept kept = kept_tokens(scratch, b, row, tokens, highest, maxima);
  const float min_p = b.min_p[row], bound = min_p > 0 ? highest + logf(min_p) : -INFINITY;
  Best chosen{-INFINITY, kNoToken};
  for (int four = threadIdx.x; four * 4 < int(b.vocab); four += kThreads) {
    Philox4 words;
    bool has_words = false;
    for (int id = four * 4; id < min(four * 4 + 4, int(b.vocab)); ++id) {
      const float y = tokens.cooled(id);
      if (!(y >= bound) || y == -INFINITY || !kept.has(y, id)) continue;
      if (!has_words) words = philox(uint64_t(b.seeds[row]), uint64_t(b.counters[row]), uint32_t(four));
      has_words = true;
      const uint32_t word = id % 4 < 2 ? (id % 4 ? words.word[1] : words.word[0])
                                       : (id % 4 == 2 ? words.word[2] : words.word[3]);
      chosen = better(chosen, {y + gumbel(word), id});
    }
  }
  return block_best(chosen).id;
}

__global__ void __launch_bounds__(kThreads) sample_kernel(float* all_logits, const SamplingBatch b,
                                                          const SamplingResult result, uint32_t* all_counts) {
  OCTET_SHARED(Mass, bins, 256);
  OCTET_SHARED(Mass, before, 1);
  OCTET_SHARED(int, digit, 1);
  OCTET_SHARED(float, maxima, kThreads);
  const SelectionScratch scratch{bins, before, digit};
  const int row = blockIdx.x, vocab = int(b.vocab), n = int(result.num_top);
  float* logits = all_logits + int64_t(row) * vocab;
  const Best raw = forbid(logits, vocab, b.allowed_bits);
  __syncthreads();  // the row is read by all from here on
  const float log_total = log_sum_exp(logits, vocab, raw.score);
  const bool is_sound = isfinite(log_total);
  if (n > 0 && is_sound) {
    write_top(scratch, logits, vocab, log_total, n, result.top_ids + int64_t(row) * n,
              result.top_logprobs + int64_t(row) * n, maxima);
  } else {
    for (int i = threadIdx.x; i < n; i += kThreads) {
      result.top_ids[int64_t(row) * n + i] = -1;
      result.top_logprobs[int64_t(row) * n + i] = -INFINITY;
    }
  }
  int id = kNoToken;
  if (is_sound) {
    Row tokens{logits,
               count_changes(b, row, all_counts + int64_t(row) * vocab),
               b.row_bits ? b.row_bits + int64_t(row) * ((vocab + 31) / 32) : nullptr,
               b.repetition[row],
               b.presence[row],
               b.frequency[row],
               1};
    Best best = raw;
    if (tokens.counts || tokens.bits) {
      best = {-INFINITY, kNoToken};
      for (int i = threadIdx.x; i < vocab; i += kThreads) best = better(best, {tokens.changed(i), i});
      best = block_best(best);
    }
    id = best.id;
    if (best.score > -INFINITY && b.temperature[row] >= kGreedyBelow) {
      id = draw(scratch, b, row, tokens, best, maxima);
    } else if (best.score == -INFINITY) {
      id = kNoToken;
    }
  }
  if (threadIdx.x == 0) {
    const bool is_chosen = id != kNoToken;
    result.token_ids[row] = is_chosen ? id : -1;
    result.logprobs[row] = is_chosen ? logits[id] - log_total : -INFINITY;
  }
}

}  // namespace

int64_t sampling_workspace_bytes(int64_t num_rows, int64_t vocab) {
  return num_rows * vocab * 4;
}

Status sample_tokens(Stream stream, float* logits, const SamplingBatch& batch, const SamplingResult& result,
                     void* workspace) {
  if (result.num_top > kThreads) return "at most 512 top log-probabilities can be told";
  if (batch.vocab >= int64_t(1) << 23) return "the vocabulary must have fewer than 2^23 ids";
  if (batch.num_rows == 0) return nullptr;
  return launch({"sample_tokens", dim3(unsigned(batch.num_rows)), kThreads, 0, stream}, sample_kernel, logits,
                batch, result, static_cast<uint32_t*>(workspace));
}

}  // namespace octet::gpu

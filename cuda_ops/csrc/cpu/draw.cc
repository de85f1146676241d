// cpu/draw.cc   The highest logit + Gumbel noise; see draw.h.
//
//   noise = -log(-log(1 - u)), u = (word + 0.5) / 2^32, in double for the few tokens that can win
//
//   bound   noise <= -log(u), since -log(1 - u) >= u; and log2(x) >= bits(x) / 2^23 - 127, where bits(x) are
//           those of the float x as an integer: two conversions and a multiply-add per token
//   flops   twenty 32-bit products for four tokens; none for blocks in which no logit + most noise can win
//   map     64 tokens at a time; stretches over threads where the row is the only one
//   order   no sums

#include "draw.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "../common/philox.h"
#include "../common/scratch.h"
#include "../common/status.h"
#include "../common/thread_pool.h"
#include "row_scan.h"

namespace octet::cpu {
namespace {

constexpr float kMostNoise = 23.0f;  // -log(2^-33), rounded up
static_assert(kScanBlock % (4 * PhiloxLanes::kFours) == 0 && kStretch % kScanBlock == 0);

double noise_of(uint32_t word) {
  const double u = (double(word) + 0.5) * 0x1p-32;
  return -std::log(-std::log1p(-u));
}

// At least noise_of(word).
float noise_bound(uint32_t word) {
  constexpr float kLog2 = 0.6931472f;
  const float u = float(int32_t(word >> 8));  // in units of 2^-24, rounded down
  return kLog2 * (24 + 127) - kLog2 * 0x1p-23f * float(std::bit_cast<int32_t>(u));
}

struct Best {
  double sum = -std::numeric_limits<double>::infinity();
  int32_t id = -1;

  // A sum in floats that is below this one can't be higher in doubles.
  float bound() const { return float(sum) - 1e-3f - 1e-6f * float(std::abs(sum)); }
};

struct Row {
  const float* logits;
  int64_t vocab;
  Token last;
  uint64_t seed, counter;

  void offer_block(int64_t begin, int64_t end, Best& best) const {
    uint32_t words[kScanBlock];
    for (int64_t i = 0; i < kScanBlock; i += 4 * PhiloxLanes::kFours) {
      philox_fours(seed, counter, uint32_t((begin + i) / 4), words + i);
    }
    float most[kScanBlock];
    for (int64_t i = 0; i < end - begin; ++i) most[i] = logits[begin + i] + noise_bound(words[i]);
    if (highest_of(most, end - begin) < best.bound()) return;
    for (int64_t i = begin; i < end; ++i) {
      const Token token{logits[i], int32_t(i)};
      if (most[i - begin] < best.bound() || token.logit == kNever || is_better(last, token)) continue;
      const double sum = double(token.logit) + noise_of(words[i - begin]);
      if (sum > best.sum) best = {sum, token.id};
    }
  }

  Best best_of(int64_t first, int64_t end) const {
    Best best;
    blocks_reaching(
        logits + first, end - first, [&] { return std::max(last.logit, best.bound() - kMostNoise); },
        [&](int64_t i, int64_t j) { offer_block(first + i, first + j, best); });
    return best;
  }
};

}  // namespace

int32_t draw_token(const float* logits, int64_t vocab, Token last, uint64_t seed, uint64_t counter) {
  const Row row{logits, vocab, last, seed, counter};
  const int64_t num_stretches = ceil_div(vocab, kStretch);
  Best* bests = scratch<Best>(Slot::draws, size_t(num_stretches));
  parallel_for(num_stretches,
               [&](int64_t i) { bests[i] = row.best_of(i * kStretch, std::min(vocab, (i + 1) * kStretch)); });
  Best best;
  for (int64_t i = 0; i < num_stretches; ++i) {
    if (bests[i].sum > best.sum) best = bests[i];
  }
  return best.id;
}

}  // namespace octet::cpu

// gpu/selection.cuh   The best tokens of a row by count or by mass, exactly and without sorting
//
// Tokens are ordered by score, then by lowest id. Because scores order like their bits (ordered_bits), the
// last token that stays is found digit by digit: a histogram of eight bits over the tokens that share the
// digits found so far, four times, then the same over ids among equal scores. Masses are integers, so that
// the order in which threads add them cannot change the result.

#pragma once

#include "elements.cuh"

namespace octet::gpu {

using Mass = unsigned long long;
constexpr int kSampleThreads = 512;
constexpr float kMassOfOne = 1099511627776.0f;  // 2^40: 2^23 tokens of weight 1 still fit

__device__ __forceinline__ uint32_t ordered_bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float of_ordered_bits(uint32_t bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// Tokens at least as good as the last one that stays.
struct Kept {
  uint32_t last_bits = 0;
  int last_id = 0x7fffffff;

  __device__ bool has(float score, int id) const {
    const uint32_t bits = ordered_bits(score);
    return bits > last_bits || (bits == last_bits && id <= last_id);
  }
};

struct Digit {
  int digit;
  Mass before;  // of better digits
  bool is_found;
};

// Warp 0 finds the first digit, in the order asked for, at which the running mass reaches `target`.
__device__ __forceinline__ Digit find_digit(const Mass* bins, Mass target, bool descending) {
  const int lane = threadIdx.x % 32;
  const auto bin = [&](int i) { return bins[descending ? 255 - i : i]; };
  Mass own = 0;
  for (int i = 0; i < 8; ++i) own += bin(lane * 8 + i);
  Mass inclusive = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Mass earlier = __shfl_up_sync(0xffffffffu, inclusive, step);
    if (lane >= step) inclusive += earlier;
  }
  const unsigned reached = __ballot_sync(0xffffffffu, inclusive >= target);
  const int winner = reached ? __ffs(int(reached)) - 1 : 0;
  Mass before = inclusive - own;
  int digit = lane * 8;
  while (digit < lane * 8 + 7 && before + bin(digit) < target) before += bin(digit++);
  digit = __shfl_sync(0xffffffffu, digit, winner);
  before = __shfl_sync(0xffffffffu, before, winner);
  return {descending ? 255 - digit : digit, before, reached != 0};
}

// What the block shares while it selects.
struct SelectionScratch {
  Mass* bins;    // [256]
  Mass* before;  // [1]
  int* digit;    // [1], -1: not reached
};

// One histogram and its decision: adds `weight(i)` of every i in [0, size) with `digit(i)` >= 0.
template <class DigitOf, class WeightOf>
__device__ Digit vote(const SelectionScratch& s, int size, Mass target, bool descending, DigitOf digit_of,
                      WeightOf weight_of) {
  for (int i = threadIdx.x; i < 256; i += kSampleThreads) s.bins[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < size; i += kSampleThreads) {
    const int digit = digit_of(i);
    if (digit >= 0) atomicAdd(&s.bins[digit], weight_of(i));
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const Digit found = find_digit(s.bins, target, descending);
    if (threadIdx.x == 0) {
      *s.digit = found.is_found ? found.digit : -1;
      *s.before = found.before;
    }
  }
  __syncthreads();
  const Digit result{*s.digit, *s.before, *s.digit >= 0};
  __syncthreads();
  return result;
}

// The smallest set of best tokens whose masses reach `target`, out of those in `within` with a score of at
// least `bound` (which may only leave out tokens that cannot belong). All of them, if they do not reach it.
//   score(i) of [0, size), -inf: never chosen     mass(score) depends on the score alone
template <class Score, class MassOf>
__device__ Kept keep_best(const SelectionScratch& s, int size, const Kept& within, float bound, Mass target,
                          Score score, MassOf mass) {
  uint32_t found = 0, known = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    const auto digit_of = [&](int i) {
      const float y = score(i);
      if (!(y >= bound) || y == -INFINITY || !within.has(y, i)) return -1;
      const uint32_t bits = ordered_bits(y);
      return (bits & known) == found ? int(bits >> shift & 255u) : -1;
    };
    const Digit digit = vote(s, size, target, true, digit_of, [&](int i) { return mass(score(i)); });
    if (!digit.is_found) return within;
    found |= uint32_t(digit.digit) << shift;
    known |= 255u << shift;
    target -= digit.before;
  }
  // Equal scores have equal masses, so this many of them are needed; the lowest ids stay.
  const Mass each = mass(of_ordered_bits(found));
  Mass needed = each ? (target + each - 1) / each : 1;
  int last_id = 0, known_id = 0;
  for (int shift = 16; shift >= 0; shift -= 8) {
    const auto digit_of = [&](int i) {
      const float y = score(i);
      const bool is_equal = ordered_bits(y) == found && within.has(y, i);
      return is_equal && (i & known_id) == last_id ? i >> shift & 255 : -1;
    };
    const Digit digit = vote(s, size, needed, false, digit_of, [](int) { return Mass(1); });
    if (!digit.is_found) return {found, within.last_bits == found ? within.last_id : 0x7fffffff};
    last_id |= digit.digit << shift;
    known_id |= 255 << shift;
    needed -= digit.before;
  }
  return {found, last_id};
}

}  // namespace octet::gpu

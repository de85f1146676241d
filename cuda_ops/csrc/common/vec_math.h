// common/vec_math.h   exp and the activations built on it, sixteen lanes at a time.
//
// A lane's result depends on that lane's input alone, so a tail may be padded with anything.

#pragma once

#include <cmath>

#include "status.h"
#include "vec.h"

namespace octet {

// e^x within 2 units in the last place; 0 below -87.33, finite (2.4e38) above 88.37; NaN stays NaN.
// Cody and Waite 1980: x = n ln 2 + r with |r| <= ln 2 / 2, then a polynomial of degree 7 in r.
inline F32x16 exp(F32x16 x) {
  const F32x16 lowest = broadcast(-87.33f);
  const F32x16 inside = max(lowest, min(broadcast(88.37f), x));
  const F32x16 n = round(inside * broadcast(1.44269504f));
  const F32x16 r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), inside));
  F32x16 p = broadcast(1.98412698e-4f);
  p = fma(p, r, broadcast(1.38888889e-3f));
  p = fma(p, r, broadcast(8.33333333e-3f));
  p = fma(p, r, broadcast(4.16666667e-2f));
  p = fma(p, r, broadcast(1.66666667e-1f));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r * r, r) + broadcast(1.0f);
  return select_less(x, lowest, zeros(), p * pow2(n));
}

inline float exp_one(float x) {
  float lanes[16];
  store(lanes, exp(broadcast(x)));
  return lanes[0];
}

inline F32x16 sigmoid(F32x16 x) {
  const F32x16 one = broadcast(1.0f);
  return one / (one + exp(zeros() - x));
}
inline F32x16 silu(F32x16 x) {
  return x * sigmoid(x);
}
inline F32x16 quick_gelu(F32x16 x) {
  return x * sigmoid(x * broadcast(1.702f));
}

// Exact: x * Phi(x) with erf of the C library.
inline F32x16 gelu(F32x16 x) {
  float lanes[16];
  store(lanes, x);
  for (float& lane : lanes) lane = 0.5f * lane * (1.0f + std::erf(lane * 0.70710678f));
  return load(lanes);
}

// body(i, n) for every 16 lanes of [0, size): n is 16, or what is left at the end.
template <class Body>
inline void by_sixteen(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) body(i, int64_t(16));
  if (i < size) body(i, size - i);
}

template <class T>
inline F32x16 load_upto(const T* p, int64_t n) {
  return n == 16 ? load(p) : load_first(p, n);
}
template <class T>
inline void store_upto(T* p, F32x16 a, int64_t n) {
  if (n == 16) {
    store(p, a);
  } else {
    store_first(p, a, n);
  }
}

}  // namespace octet

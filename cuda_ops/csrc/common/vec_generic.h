// common/vec_generic.h   F32x16 as an array, for any machine with a C++ compiler. See vec.h.

#pragma once

#include <cmath>
#include <cstddef>

namespace octet {

struct F32x16 {
  float lane[16];
};

// Register tile of a matrix product; small, because little is known about the machine.
constexpr int kTileRows = 2, kTileCols = 2;

template <class Each>
inline F32x16 by_lane(Each each) {
  F32x16 out;
  for (int i = 0; i < 16; ++i) out.lane[i] = each(i);
  return out;
}

inline F32x16 broadcast(float x) {
  return by_lane([&](int) { return x; });
}
inline F32x16 zeros() {
  return broadcast(0.0f);
}

inline float widen(float x) {
  return x;
}
inline float widen(BF16 x) {
  return to_float(x);
}
inline float widen(int8_t x) {
  return float(x);
}

template <class T>
F32x16 load(const T* p) {
  return by_lane([&](int i) { return widen(p[i]); });
}

// The first n < 16 lanes; the others are zero and their memory is not touched.
template <class T>
F32x16 load_first(const T* p, int64_t n) {
  return by_lane([&](int i) { return i < n ? widen(p[i]) : 0.0f; });
}

// Sixteen table entries chosen by sixteen nibbles in 8 bytes, low nibble first.
inline F32x16 load_nibbles(const uint8_t* p, const F32x16& table) {
  return by_lane([&](int i) { return table.lane[(p[i / 2] >> (i % 2 * 4)) & 15]; });
}

template <class T>
void store_first(T* p, const F32x16& a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) assign(p[i], a.lane[i]);
}
template <class T>
void store(T* p, const F32x16& a) {
  store_first(p, a, 16);
}

inline F32x16 fma(const F32x16& a, const F32x16& b, const F32x16& c) {
  return by_lane([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline F32x16 operator+(const F32x16& a, const F32x16& b) {
  return by_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline F32x16 operator-(const F32x16& a, const F32x16& b) {
  return by_lane([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline F32x16 operator*(const F32x16& a, const F32x16& b) {
  return by_lane([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline F32x16 operator/(const F32x16& a, const F32x16& b) {
  return by_lane([&](int i) { return a.lane[i] / b.lane[i]; });
}

// b where either is NaN.
inline F32x16 max(const F32x16& a, const F32x16& b) {
  return by_lane([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F32x16 min(const F32x16& a, const F32x16& b) {
  return by_lane([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}

// a < b ? x : y, lane by lane.
inline F32x16 select_less(const F32x16& a, const F32x16& b, const F32x16& x, const F32x16& y) {
  return by_lane([&](int i) { return a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i]; });
}

inline F32x16 round(const F32x16& a) {
  return by_lane([&](int i) { return std::nearbyint(a.lane[i]); });
}

// 2^n for integer-valued n in [-126, 127].
inline F32x16 pow2(const F32x16& n) {
  return by_lane([&](int i) { return std::ldexp(1.0f, std::isnan(n.lane[i]) ? 0 : int(n.lane[i])); });
}

// Lanes 8 apart first, then 4, 2, 1.
inline float sum(F32x16 a) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.lane[i] += a.lane[i + half];
  }
  return a.lane[0];
}
inline float max_lane(F32x16 a) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.lane[i] = a.lane[i] > a.lane[i + half] ? a.lane[i] : a.lane[i + half];
  }
  return a.lane[0];
}

// (a, b) of each two lanes -> (a c - b s, b c + a s), where the lanes of `cos_sin` are (c, s).
inline F32x16 turn_pairs(const F32x16& x, const F32x16& cos_sin) {
  F32x16 out;
  for (int i = 0; i < 16; i += 2) {
    const float a = x.lane[i], b = x.lane[i + 1], c = cos_sin.lane[i], s = cos_sin.lane[i + 1];
    out.lane[i] = a * c - b * s;
    out.lane[i + 1] = b * c + a * s;
  }
  return out;
}

// rows[i] lane j <-> rows[j] lane i.
inline void transpose(F32x16 (&rows)[16]) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < i; ++j) {
      const float kept = rows[i].lane[j];
      rows[i].lane[j] = rows[j].lane[i];
      rows[j].lane[i] = kept;
    }
  }
}

}  // namespace octet

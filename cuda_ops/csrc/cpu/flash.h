// cpu/flash.h   Softmax attention of a few query rows over one KV segment, and the merge of segments.
//
// Shared by paged_attention.cc and segment_attention.cc, which say where K and V rows lie.
//
//   words   q and K meet as 32-bit words: one fp32 element, or two bf16 ones where the machine multiplies
//   them
//           directly (vdpbf16ps), which halves both the turning of K and the products. int8 K becomes bf16,
//           exactly; its scale, one per position, multiplies the score, and V's the value.
//   order   score = words over head_dim ascending, one lane per position; sum of exponentials = 16 sums
//           (position mod 16), then the tree of vec.h; weighted values = positions ascending. A position
//           that a row may not see adds exactly zero to these (values being finite), so neither the other
//           rows of the tile nor the positions after a row's own take part in its bits.
//   NaN     memory of positions at or beyond `num_positions` is never read
//   ahead   of the next block's rows memory is asked while this one's are read (two cores of a Zen 3,
//           2026-11-30, a query of 20 heads over 4 of bf16: 32,768 positions in 7.5 ms, 10.4 without)

#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include "../common/scratch.h"
#include "../common/vec_math.h"
#include "../include/attention.h"

namespace octet::cpu {

constexpr int64_t kQueryRows = 48;  // rows of one tile, so that a converted K or V block is used often
// Positions converted to fp32 at a time: K or V of a block fit the first-level cache.
constexpr int64_t kKvBlock = 16 * kTileCols;

inline int64_t padded(int64_t head_dim) {
  return ceil_div(head_dim, 16) * 16;
}

// What a tile of rows knows about one segment, or about all segments so far.
struct Partial {
  float* maximum;  // [rows]
  float* sum;      // [rows] of e^(score - maximum)
  float* values;   // [rows, padded(head_dim)] weighted by e^(score - maximum)

  static int64_t size(int64_t rows, int64_t head_dim) { return rows * (2 + padded(head_dim)); }
  static Partial in(float* memory, int64_t rows) { return {memory, memory + rows, memory + 2 * rows}; }

  void clear(int64_t rows, int64_t head_dim) const {
    std::fill(maximum, maximum + rows, -std::numeric_limits<float>::infinity());
    std::fill(sum, sum + rows, 0.0f);
    std::fill(values, values + rows * padded(head_dim), 0.0f);
  }
};

// The query rows of one tile and how far each may look.
struct QueryTile {
  const float* q;         // [rows, words of head_dim]
  const int64_t* limits;  // [rows] a row sees positions [0, limit)
  int64_t rows, head_dim;
  float scale;  // of the scores
};

// Where the rows of one segment lie. int8 rows come with their scales.
template <class C>
struct KvRows {
  const C *k[kKvSegment], *v[kKvSegment];
  float k_scales[kKvSegment], v_scales[kKvSegment];
};

// Activations of type T as words.
template <class T>
struct Words {
  static constexpr int64_t kColumns = 1;
  static F32x16 add_product(F32x16 q, F32x16 key, F32x16 sums) { return fma(q, key, sums); }
};

#if defined(__AVX512BF16__)
template <>
struct Words<BF16> {
  static constexpr int64_t kColumns = 2;
  static F32x16 add_product(F32x16 q, F32x16 key, F32x16 sums) {
    return {_mm512_dpbf16_ps(sums.v, (__m512bh)q.v, (__m512bh)key.v)};
  }
};
#endif

template <class T>
inline int64_t num_words(int64_t head_dim) {
  return head_dim / Words<T>::kColumns;
}

// One row as words; `row` may be of another type than T only where a word is one column.
template <class T, class C>
inline F32x16 load_words(const C* row, int64_t word, int64_t n) {
  if constexpr (Words<T>::kColumns == 2) {
    return load_upto(reinterpret_cast<const float*>(row) + word, n);  // moves bits, whatever they mean
  } else {
    return load_upto(row + word, n);
  }
}

// Rows of K or V that are read next. Memory is asked for each of them where a row before it is read: asked
// for all at once they wait for one another, and unasked they come late, since the prefetchers stop at the
// end of a head's part of a block.
template <class C>
struct Ahead {
  const C* const* rows = nullptr;
  int64_t count = 0;

  void ask(int64_t row, int64_t column) const {
    if (row < count) __builtin_prefetch(rows[row] + column);
  }
};

// Rows of K turned so that a lane is a position: out[w * kKvBlock + i] = word w of rows[i], zero for i >= n.
template <class T, class C>
void turn_keys(const C* const* rows, int64_t n, Ahead<C> ahead, int64_t head_dim, float* out) {
  for (int64_t i = 0; i < kKvBlock; i += 16) {
    by_sixteen(num_words<T>(head_dim), [&](int64_t w, int64_t width) {
      F32x16 square[16];
      for (int64_t r = 0; r < 16; ++r) {
        ahead.ask(i + r, w * Words<T>::kColumns);
        square[r] = i + r < n ? load_words<T>(rows[i + r], w, width) : zeros();
      }
      transpose(square);
      for (int64_t r = 0; r < width; ++r) store(out + (w + r) * kKvBlock + i, square[r]);
    });
  }
}

template <class T, class C>
void load_keys(const C* const* rows, int64_t n, Ahead<C> ahead, int64_t head_dim, float* out) {
  if constexpr (std::is_same_v<C, int8_t> && Words<T>::kColumns == 2) {
    BF16* converted = scratch<BF16>(Slot::values, size_t(kKvBlock * head_dim));
    const BF16* converted_rows[kKvBlock];
    for (int64_t i = 0; i < n; ++i) {
      BF16* row = converted + i * head_dim;
      by_sixteen(head_dim, [&](int64_t d, int64_t width) {
        ahead.ask(i, d);
        store_upto(row + d, load_upto(rows[i] + d, width), width);
      });
      converted_rows[i] = row;
    }
    turn_keys<T, BF16>(converted_rows, n, {}, head_dim, out);
  } else {
    turn_keys<T>(rows, n, ahead, head_dim, out);
  }
}

// out[i * padded(head_dim) + d] = rows[i][d], times scales[i] for int8; zero in the padding.
template <class C>
void load_values(const C* const* rows, const float* scales, int64_t n, Ahead<C> ahead, int64_t head_dim,
                 float* out) {
  for (int64_t i = 0; i < n; ++i) {
    by_sixteen(head_dim, [&](int64_t d, int64_t width) {
      ahead.ask(i, d);
      F32x16 value = load_upto(rows[i] + d, width);
      if constexpr (std::is_same_v<C, int8_t>) value = value * broadcast(scales[i]);
      store(out + i * padded(head_dim) + d, value);
    });
  }
}

template <class T, int kRows>
void score_tile(const float* q, int64_t words, const float* keys, float* scores) {
  F32x16 sums[kRows][kTileCols];
  for (auto& row : sums) std::fill(std::begin(row), std::end(row), zeros());
  for (int64_t w = 0; w < words; ++w) {
    F32x16 key[kTileCols];
#pragma GCC unroll 8
    for (int j = 0; j < kTileCols; ++j) key[j] = load(keys + w * kKvBlock + j * 16);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const F32x16 x = broadcast(q[i * words + w]);
#pragma GCC unroll 8
      for (int j = 0; j < kTileCols; ++j) sums[i][j] = Words<T>::add_product(x, key[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kTileCols; ++j) store(scores + i * kKvSegment + j * 16, sums[i][j]);
  }
}

template <int kRows, int kCols>
void value_tile(const float* weights, const float* values, int64_t n, int64_t stride, float* out) {
  F32x16 sums[kRows][kCols];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kCols; ++j) sums[i][j] = load(out + i * stride + j * 16);
  }
  for (int64_t p = 0; p < n; ++p) {
    F32x16 value[kCols];
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) value[j] = load(values + p * stride + j * 16);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const F32x16 weight = broadcast(weights[i * kKvSegment + p]);
#pragma GCC unroll 8
      for (int j = 0; j < kCols; ++j) sums[i][j] = fma(weight, value[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kCols; ++j) store(out + i * stride + j * 16, sums[i][j]);
  }
}

using ScoreTile = void (*)(const float*, int64_t, const float*, float*);
using ValueTile = void (*)(const float*, const float*, int64_t, int64_t, float*);

template <class T, int... rows>
ScoreTile pick_score_tile(int64_t num_rows, std::integer_sequence<int, rows...>) {
  static constexpr ScoreTile by_rows[] = {score_tile<T, rows + 1>...};
  return by_rows[num_rows - 1];
}
template <int kCols, int... rows>
ValueTile pick_value_tile(int64_t num_rows, std::integer_sequence<int, rows...>) {
  static constexpr ValueTile by_rows[] = {value_tile<rows + 1, kCols>...};
  return by_rows[num_rows - 1];
}

// scores[r, i] = q[r] . key i   for the kKvBlock positions of one block
template <class T>
void score_block(const QueryTile& tile, const float* keys, float* scores) {
  constexpr auto shapes = std::make_integer_sequence<int, kTileRows>();
  const int64_t words = num_words<T>(tile.head_dim);
  for (int64_t r = 0; r < tile.rows; r += kTileRows) {
    const ScoreTile run = pick_score_tile<T>(std::min<int64_t>(kTileRows, tile.rows - r), shapes);
    for (int64_t i = 0; i < kKvBlock; i += kTileCols * 16) {
      run(tile.q + r * words, words, keys + i, scores + r * kKvSegment + i);
    }
  }
}

// out[r, :] += sum_i weights[r, i] * value i   for the n positions of one block
inline void value_block(const QueryTile& tile, const float* weights, const float* values, int64_t n,
                        float* out) {
  constexpr auto shapes = std::make_integer_sequence<int, kTileRows>();
  const int64_t stride = padded(tile.head_dim), vectors = stride / 16;
  for (int64_t r = 0; r < tile.rows; r += kTileRows) {
    const int64_t rows = std::min<int64_t>(kTileRows, tile.rows - r);
    for (int64_t j = 0; j < vectors;) {
      const bool is_full = vectors - j >= kTileCols;
      const ValueTile run =
          is_full ? pick_value_tile<kTileCols>(rows, shapes) : pick_value_tile<1>(rows, shapes);
      run(weights + r * kKvSegment, values + j * 16, n, stride, out + r * stride + j * 16);
      j += is_full ? kTileCols : 1;
    }
  }
}

// Replaces the first `visible` of kKvSegment scores by e^(score * factor - maximum) and the others by 0.
inline void soften_row(float* scores, const float* factors, int64_t visible, float& maximum, float& total) {
  const float lowest = -std::numeric_limits<float>::infinity();
  F32x16 highest = broadcast(lowest), sums = zeros();
  const int64_t whole = visible / 16 * 16;
  by_sixteen(visible, [&](int64_t i, int64_t n) {
    store_upto(scores + i, load_upto(scores + i, n) * load_upto(factors + i, n), n);
  });
  std::fill(scores + visible, scores + std::min(kKvSegment, whole + 16), lowest);
  const int64_t used = std::min(kKvSegment, ceil_div(visible, 16) * 16);
  for (int64_t i = 0; i < used; i += 16) highest = max(highest, load(scores + i));
  maximum = max_lane(highest);
  for (int64_t i = 0; i < used; i += 16) {
    const F32x16 weights = exp(load(scores + i) - broadcast(maximum));
    store(scores + i, weights);
    sums = sums + weights;
  }
  std::fill(scores + used, scores + kKvSegment, 0.0f);
  total = sum(sums);
}

// One segment: positions [first, first + num_positions), at most kKvSegment of them. T is the type of q, C
// that of K and V. fill(position, n, rows) names the n rows that start at a position.
template <class T, class C, class Fill>
void attend_segment(const QueryTile& tile, int64_t first, int64_t num_positions, Fill fill, Partial out) {
  const int64_t hd = tile.head_dim;
  float* block = scratch<float>(Slot::keys, size_t(kKvBlock * padded(hd)));
  float* scores = scratch<float>(Slot::scores, size_t(tile.rows * kKvSegment));
  KvRows<C> kv;
  fill(first, num_positions, kv);
  float factors[kKvSegment];
  for (int64_t i = 0; i < num_positions; ++i) {
    factors[i] = std::is_same_v<C, int8_t> ? tile.scale * kv.k_scales[i] : tile.scale;
  }
  out.clear(tile.rows, hd);
  const auto block_size = [&](int64_t i) { return std::clamp<int64_t>(num_positions - i, 0, kKvBlock); };
  for (int64_t i = 0; i < num_positions; i += kKvBlock) {
    const int64_t next = i + kKvBlock;
    const bool is_last = next >= num_positions;
    const Ahead<C> ahead{is_last ? kv.v : kv.k + next, block_size(is_last ? 0 : next)};
    load_keys<T>(kv.k + i, block_size(i), ahead, hd, block);
    score_block<T>(tile, block, scores + i);
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t visible = std::clamp<int64_t>(tile.limits[r] - first, 0, num_positions);
    float* row = scores + r * kKvSegment;
    if (visible == 0) {
      std::fill(row, row + kKvSegment, 0.0f);
    } else {
      soften_row(row, factors, visible, out.maximum[r], out.sum[r]);
    }
  }
  for (int64_t i = 0; i < num_positions; i += kKvBlock) {
    const Ahead<C> ahead{kv.v + i + kKvBlock, block_size(i + kKvBlock)};
    load_values(kv.v + i, kv.v_scales + i, block_size(i), ahead, hd, block);
    value_block(tile, scores + i, block, block_size(i), out.values);
  }
}

// all = all joined with next, the segment that follows.
inline void merge(Partial all, Partial next, int64_t rows, int64_t head_dim) {
  const int64_t stride = padded(head_dim);
  for (int64_t r = 0; r < rows; ++r) {
    if (next.sum[r] == 0.0f) continue;  // the row sees nothing of this segment
    const float highest = std::max(all.maximum[r], next.maximum[r]);
    const F32x16 a = broadcast(exp_one(all.maximum[r] - highest));
    const F32x16 b = broadcast(exp_one(next.maximum[r] - highest));
    float lanes[16];
    store(lanes, fma(broadcast(all.sum[r]), a, broadcast(next.sum[r]) * b));
    all.sum[r] = lanes[0];
    all.maximum[r] = highest;
    for (int64_t d = r * stride; d < (r + 1) * stride; d += 16) {
      store(all.values + d, fma(load(all.values + d), a, load(next.values + d) * b));
    }
  }
}

// out[d] = values[d] / sum for one row
template <class T>
void finish_row(Partial all, int64_t row, int64_t head_dim, T* out) {
  const F32x16 total = broadcast(all.sum[row]);
  by_sixteen(head_dim, [&](int64_t d, int64_t n) {
    store_upto(out + d, load(all.values + row * padded(head_dim) + d) / total, n);
  });
}

// A row of q as words.
template <class T>
void load_query(const T* row, int64_t head_dim, float* q) {
  by_sixteen(num_words<T>(head_dim),
             [&](int64_t w, int64_t n) { store_upto(q + w, load_words<T>(row, w, n), n); });
}

constexpr Status kOddHeads = "head_dim must be even";

}  // namespace octet::cpu

// cpu/flash.h   Softmax attention of a few query rows over one KV segment, and the merge of segments.
//
// Shared by paged_attention.cc and segment_attention.cc, which say where K and V rows lie.
//
//   order   score = products over head_dim ascending, one lane per position; sum of exponentials = 16 sums
//           (position mod 16), then the tree of vec.h; weighted values = positions ascending. A position
//           that a row may not see adds exactly zero to these (values being finite), so neither the other
//           rows of the tile nor the positions after a row's own take part in its bits.
//   NaN     memory of positions at or beyond `num_positions` is never read

#pragma once

#include <algorithm>
#include <limits>
#include <utility>

#include "../common/scratch.h"
#include "../common/vec_math.h"
#include "../include/attention.h"

namespace octet::cpu {

constexpr int64_t kQueryRows = 48;  // rows of one tile, so that a converted K or V block is used often
constexpr int64_t kKvBlock = 64;    // positions converted to fp32 at a time; K or V fit the first-level cache

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
  const float* q;         // [rows, head_dim], times the softmax scale
  const int64_t* limits;  // [rows] a row sees positions [0, limit)
  int64_t rows, head_dim;
};

// Rows of K or V turned so that a lane is a position: out[d * kKvBlock + i] = rows[i][d], zero for i >= n.
template <class T>
void load_keys(const T* const* rows, int64_t n, int64_t head_dim, float* out) {
  for (int64_t i = 0; i < kKvBlock; i += 16) {
    by_sixteen(head_dim, [&](int64_t d, int64_t width) {
      F32x16 square[16];
      for (int64_t r = 0; r < 16; ++r) square[r] = i + r < n ? load_upto(rows[i + r] + d, width) : zeros();
      transpose(square);
      for (int64_t r = 0; r < width; ++r) store(out + (d + r) * kKvBlock + i, square[r]);
    });
  }
}

// out[i * padded(head_dim) + d] = rows[i][d], zero in the padding.
template <class T>
void load_values(const T* const* rows, int64_t n, int64_t head_dim, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    by_sixteen(head_dim, [&](int64_t d, int64_t width) {
      store(out + i * padded(head_dim) + d, load_upto(rows[i] + d, width));
    });
  }
}

template <int kRows>
void score_tile(const float* q, int64_t head_dim, const float* keys, float* scores) {
  F32x16 sums[kRows][kTileCols];
  for (auto& row : sums) std::fill(std::begin(row), std::end(row), zeros());
  for (int64_t d = 0; d < head_dim; ++d) {
    F32x16 key[kTileCols];
#pragma GCC unroll 8
    for (int j = 0; j < kTileCols; ++j) key[j] = load(keys + d * kKvBlock + j * 16);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const F32x16 x = broadcast(q[i * head_dim + d]);
#pragma GCC unroll 8
      for (int j = 0; j < kTileCols; ++j) sums[i][j] = fma(x, key[j], sums[i][j]);
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

template <int... rows>
ScoreTile pick_score_tile(int64_t num_rows, std::integer_sequence<int, rows...>) {
  static constexpr ScoreTile by_rows[] = {score_tile<rows + 1>...};
  return by_rows[num_rows - 1];
}
template <int kCols, int... rows>
ValueTile pick_value_tile(int64_t num_rows, std::integer_sequence<int, rows...>) {
  static constexpr ValueTile by_rows[] = {value_tile<rows + 1, kCols>...};
  return by_rows[num_rows - 1];
}

// scores[r, i] = q[r] . key i   for the kKvBlock positions of one block
inline void score_block(const QueryTile& tile, const float* keys, float* scores) {
  constexpr auto shapes = std::make_integer_sequence<int, kTileRows>();
  for (int64_t r = 0; r < tile.rows; r += kTileRows) {
    const ScoreTile run = pick_score_tile(std::min<int64_t>(kTileRows, tile.rows - r), shapes);
    for (int64_t i = 0; i < kKvBlock; i += kTileCols * 16) {
      run(tile.q + r * tile.head_dim, tile.head_dim, keys + i, scores + r * kKvSegment + i);
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

// Replaces the first `visible` of kKvSegment scores by e^(score - maximum) and the others by 0.
inline void soften_row(float* scores, int64_t visible, float& maximum, float& total) {
  const float lowest = -std::numeric_limits<float>::infinity();
  F32x16 highest = broadcast(lowest), sums = zeros();
  const int64_t whole = visible / 16 * 16;
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

// One segment: positions [first, first + num_positions), at most kKvSegment of them.
// fill(position, n, k_rows, v_rows) names the n rows of K and V that start at a position.
template <class T, class Fill>
void attend_segment(const QueryTile& tile, int64_t first, int64_t num_positions, Fill fill, Partial out) {
  const int64_t hd = tile.head_dim;
  float* block = scratch<float>(Slot::keys, size_t(kKvBlock * padded(hd)));
  float* scores = scratch<float>(Slot::scores, size_t(tile.rows * kKvSegment));
  const T *k_rows[kKvSegment], *v_rows[kKvSegment];
  fill(first, num_positions, k_rows, v_rows);
  out.clear(tile.rows, hd);
  for (int64_t i = 0; i < num_positions; i += kKvBlock) {
    load_keys(k_rows + i, std::min(kKvBlock, num_positions - i), hd, block);
    score_block(tile, block, scores + i);
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t visible = std::clamp<int64_t>(tile.limits[r] - first, 0, num_positions);
    float* row = scores + r * kKvSegment;
    if (visible == 0) {
      std::fill(row, row + kKvSegment, 0.0f);
    } else {
      soften_row(row, visible, out.maximum[r], out.sum[r]);
    }
  }
  for (int64_t i = 0; i < num_positions; i += kKvBlock) {
    const int64_t n = std::min(kKvBlock, num_positions - i);
    load_values(v_rows + i, n, hd, block);
    value_block(tile, scores + i, block, n, out.values);
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

// q[d] = row[d] * scale in fp32
template <class T>
void load_query(const T* row, float scale, int64_t head_dim, float* q) {
  by_sixteen(head_dim,
             [&](int64_t d, int64_t n) { store_upto(q + d, load_upto(row + d, n) * broadcast(scale), n); });
}

}  // namespace octet::cpu

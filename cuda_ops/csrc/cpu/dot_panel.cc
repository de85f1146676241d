// cpu/dot_panel.cc   x_rows[i] . W[n] for a few weight rows and any number of activation rows.
//
//   x  [num_rows, K] by pointer, fp32 (or bf16 with vdpbf16ps)     W  [width, K] of any kind
//
//   bytes   W once, x once per kTileCols weight rows (from cache)
//   map     16 lanes over K; register tile of kTileRows x rows by kTileCols weight rows
//   few     at most kTileRows x rows: weights are converted in registers, each read once -> memory bound; one
//           row meets kOneRowCols weight rows
//   many    weights are dequantised once into an fp32 panel in cache -> bound by arithmetic
//   ahead   a tile asks for its share of the weight rows that come next (ahead.h). So two cores of an EPYC
//           (Zen 4, 2026-11-30, 2560 x 3584, by turns, memory at 33 GB/s) read 30 GB/s of bf16 for one row
//           and not 27, 29 and not 24 for 3 rows, 22 and not 16 for 12; of fp32 34 and not 32, 35 and not
//           29, 27 and not 18
//   order   see dot_panel.h; both ways multiply the same fp32 values in the same order, so they agree in bits

#include "dot_panel.h"

#include <algorithm>
#include <utility>

#include "../common/scratch.h"
#include "../common/thread_pool.h"
#include "../common/vec_math.h"
#include "ahead.h"

namespace octet::cpu {
namespace {

// --- what a tile multiplies ------------------------------------------------------------------------------

// Sixteen products per step, one per lane.
struct FloatDot {
  using X = float;
  using Vec = F32x16;
  static constexpr int64_t kStep = 16;
  static Vec load_x(const X* p) { return load(p); }
  static Vec load_x(const X* p, int64_t n) { return load_first(p, n); }
  static F32x16 add_product(Vec a, Vec b, F32x16 sums) { return fma(a, b, sums); }
};

// One weight row. `enter(k)` is called at each multiple of `span`; `at` and `tail` stay inside that span.
template <class T>
struct PlainRow : FloatDot {
  const T* data;

  void open(const WeightView& w, int64_t n) { data = (const T*)w.row(n); }
  static int64_t span(const WeightView& w) { return w.in_features; }
  void enter(int64_t) {}
  F32x16 at(int64_t k) const { return load(data + k); }
  F32x16 tail(int64_t k, int64_t n) const { return load_first(data + k, n); }
};

struct Int8Row : FloatDot {
  const int8_t* data;
  F32x16 scale;

  void open(const WeightView& w, int64_t n) {
    data = (const int8_t*)w.row(n);
    scale = broadcast(to_float(*w.row_scales(n)));
  }
  static int64_t span(const WeightView& w) { return w.in_features; }
  void enter(int64_t) {}
  F32x16 at(int64_t k) const { return load(data + k) * scale; }
  F32x16 tail(int64_t k, int64_t n) const { return load_first(data + k, n) * scale; }
};

// Needs group % 16 == 0. The table holds the group's scale times each of the sixteen nibble values.
struct Int4Row : FloatDot {
  const uint8_t* data;
  const BF16* scales;
  int64_t group;
  F32x16 table;

  void open(const WeightView& w, int64_t n) {
    data = (const uint8_t*)w.row(n);
    scales = w.row_scales(n);
    group = w.group;
  }
  static int64_t span(const WeightView& w) { return w.group; }
  void enter(int64_t k) {
    static const float values[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    table = load(values) * broadcast(to_float(scales[k / group]));
  }
  F32x16 at(int64_t k) const { return load_nibbles(data + k / 2, table); }
  F32x16 tail(int64_t, int64_t) const { return zeros(); }  // groups are whole
};

#if defined(__AVX512BF16__)
// bf16 by bf16: a lane sums the two products of columns 2 * lane and 2 * lane + 1 of every 32.
struct PairRow {
  using X = BF16;
  using Vec = __m512bh;
  static constexpr int64_t kStep = 32;
  static Vec load_x(const X* p) { return (Vec)_mm512_loadu_si512(p); }
  static Vec load_x(const X* p, int64_t n) {
    return (Vec)_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p);
  }
  static F32x16 add_product(Vec a, Vec b, F32x16 sums) { return {_mm512_dpbf16_ps(sums.v, a, b)}; }

  const BF16* data;

  void open(const WeightView& w, int64_t n) { data = (const BF16*)w.row(n); }
  static int64_t span(const WeightView& w) { return w.in_features; }
  void enter(int64_t) {}
  Vec at(int64_t k) const { return load_x(data + k); }
  Vec tail(int64_t k, int64_t n) const { return load_x(data + k, n); }
};
#endif

// --- register tiles --------------------------------------------------------------------------------------

// kRows x kCols outputs; the inner loops unroll so that the sums stay in registers.
template <class Row, int kRows, int kCols>
void dot_tile(const void* const* x_rows, const WeightView& w, int64_t first_row, Ahead ahead, float* out,
              int64_t out_stride) {
  using X = typename Row::X;
  const X* x[kRows];
  Row rows[kCols];
  F32x16 sums[kRows][kCols];
  typename Row::Vec weights[kCols];
  for (int j = 0; j < kCols; ++j) rows[j].open(w, first_row + j);
  for (int i = 0; i < kRows; ++i) {
    x[i] = static_cast<const X*>(x_rows[i]);
    for (int j = 0; j < kCols; ++j) sums[i][j] = zeros();
  }
  const int64_t span = Row::span(w), whole = span / Row::kStep * Row::kStep, left = span - whole;
  for (int64_t begin = 0; begin < w.in_features; begin += span) {
    for (int j = 0; j < kCols; ++j) rows[j].enter(begin);
    for (int64_t k = begin; k < begin + whole; k += Row::kStep) {
      ahead.ask();
#pragma GCC unroll 8
      for (int j = 0; j < kCols; ++j) weights[j] = rows[j].at(k);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const auto row = Row::load_x(x[i] + k);
#pragma GCC unroll 8
        for (int j = 0; j < kCols; ++j) sums[i][j] = Row::add_product(row, weights[j], sums[i][j]);
      }
    }
    if (left == 0) continue;
    for (int j = 0; j < kCols; ++j) weights[j] = rows[j].tail(begin + whole, left);
    for (int i = 0; i < kRows; ++i) {
      const auto row = Row::load_x(x[i] + begin + whole, left);
      for (int j = 0; j < kCols; ++j) sums[i][j] = Row::add_product(row, weights[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kCols; ++j) out[i * out_stride + j] = sum(sums[i][j]);
  }
}

using Tile = void (*)(const void* const*, const WeightView&, int64_t, Ahead, float*, int64_t);

template <class Row, int kCols, int... rows>
Tile pick_tile(int64_t num_rows, std::integer_sequence<int, rows...>) {
  static constexpr Tile by_rows[] = {dot_tile<Row, rows + 1, kCols>...};
  return by_rows[num_rows - 1];
}

// One row leaves registers for more weight rows, and each of them is a stream to the prefetchers.
constexpr int kOneRowCols = std::max(kTileCols, 4);

enum class Source { memory, cache };  // of weight rows; tiles ask for the next ones in memory

template <class Row>
void dot_tiles(const void* const* x_rows, int64_t num_rows, const WeightView& w, Source source,
               int64_t first_row, int64_t width, float* out, int64_t out_stride) {
  constexpr auto shapes = std::make_integer_sequence<int, kTileRows>();
  const int64_t cols = num_rows == 1 ? kOneRowCols : kTileCols, size = cols * w.row_bytes();
  const int64_t tiles = ceil_div(num_rows, kTileRows), steps = w.in_features / Row::kStep;
  for (int64_t j = 0; j < width;) {
    const bool is_full = width - j >= cols;
    for (int64_t i = 0; i < num_rows; i += kTileRows) {
      const int64_t rows = std::min<int64_t>(kTileRows, num_rows - i);
      const Tile tile = !is_full        ? pick_tile<Row, 1>(rows, shapes)
                        : num_rows == 1 ? dot_tile<Row, 1, kOneRowCols>
                                        : pick_tile<Row, kTileCols>(rows, shapes);
      Ahead ahead;
      if (source == Source::memory && is_full && steps > 0) {
        const char* later = static_cast<const char*>(w.row(first_row + j)) + size;
        ahead = Ahead::part(later, size, i / kTileRows, tiles, steps);
      }
      tile(x_rows + i, w, first_row + j, ahead, out + i * out_stride + j, out_stride);
    }
    j += is_full ? cols : 1;
  }
}

// --- dequantised panels ----------------------------------------------------------------------------------

template <class Row>
void widen_rows(const WeightView& w, int64_t first_row, int64_t width, float* panel) {
  const int64_t span = Row::span(w);
  for (int64_t j = 0; j < width; ++j, panel += w.in_features) {
    Row row;
    row.open(w, first_row + j);
    for (int64_t begin = 0; begin < w.in_features; begin += span) {
      row.enter(begin);
      by_sixteen(span, [&](int64_t i, int64_t n) {
        const int64_t k = begin + i;
        store_upto(panel + k, n == 16 ? row.at(k) : row.tail(k, n), n);
      });
    }
  }
}

// Any even group, one value at a time: groups this narrow occur in tiny models only.
void widen_narrow_groups(const WeightView& w, int64_t first_row, int64_t width, float* panel) {
  for (int64_t j = 0; j < width; ++j, panel += w.in_features) {
    const uint8_t* data = (const uint8_t*)w.row(first_row + j);
    const BF16* scales = w.row_scales(first_row + j);
    for (int64_t k = 0; k < w.in_features; ++k) {
      const int nibble = data[k / 2] >> (k % 2 * 4) & 15;
      panel[k] = float(nibble < 8 ? nibble : nibble - 16) * to_float(scales[k / w.group]);
    }
  }
}

bool has_narrow_groups(const WeightView& w) {
  return w.kind == WeightKind::int4 && w.group % 16 != 0;
}

WeightView widen_panel(const WeightView& w, int64_t first_row, int64_t width) {
  float* panel = scratch<float>(Slot::panel, size_t(width * w.in_features));
  if (has_narrow_groups(w)) {
    widen_narrow_groups(w, first_row, width, panel);
  } else if (w.kind == WeightKind::int4) {
    widen_rows<Int4Row>(w, first_row, width, panel);
  } else if (w.kind == WeightKind::int8) {
    widen_rows<Int8Row>(w, first_row, width, panel);
  } else {
    widen_rows<PlainRow<BF16>>(w, first_row, width, panel);
  }
  return WeightView{WeightKind::float32, panel, nullptr, 0, width, w.in_features};
}

}  // namespace

bool has_bf16_dot() {
#if defined(__AVX512BF16__)
  return true;
#else
  return false;
#endif
}

int64_t panel_width(int64_t out_features, int64_t in_features) {
  constexpr int64_t kPanelFloats = 64 * 1024;  // 256 KiB of a second-level cache
  const int64_t fits = std::clamp<int64_t>(kPanelFloats / std::max<int64_t>(in_features, 1), kTileCols, 64);
  const int64_t fair = ceil_div(out_features, 4 * num_threads());
  return ceil_div(std::min(fits, std::max<int64_t>(fair, 1)), kTileCols) * kTileCols;
}

void dot_panel(DType x_type, const void* const* x_rows, int64_t num_rows, const WeightView& w,
               int64_t first_row, int64_t width, float* out, int64_t out_stride) {
#if defined(__AVX512BF16__)
  if (x_type == DType::bfloat16) {
    return dot_tiles<PairRow>(x_rows, num_rows, w, Source::memory, first_row, width, out, out_stride);
  }
#else
  (void)x_type;
#endif
  if (w.kind == WeightKind::float32) {
    return dot_tiles<PlainRow<float>>(x_rows, num_rows, w, Source::memory, first_row, width, out, out_stride);
  }
  if (num_rows > kTileRows || has_narrow_groups(w)) {
    const WeightView panel = widen_panel(w, first_row, width);
    return dot_tiles<PlainRow<float>>(x_rows, num_rows, panel, Source::cache, 0, width, out, out_stride);
  }
  if (w.kind == WeightKind::bfloat16) {
    return dot_tiles<PlainRow<BF16>>(x_rows, num_rows, w, Source::memory, first_row, width, out, out_stride);
  }
  if (w.kind == WeightKind::int8) {
    return dot_tiles<Int8Row>(x_rows, num_rows, w, Source::memory, first_row, width, out, out_stride);
  }
  return dot_tiles<Int4Row>(x_rows, num_rows, w, Source::memory, first_row, width, out, out_stride);
}

}  // namespace octet::cpu

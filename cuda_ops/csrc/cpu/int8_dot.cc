// cpu/int8_dot.cc   x_rows[i] . W[n] for int8 activations and int8 or int4 weights.
//
//   x  [num_rows, K] int8 with scales per span (int8_rows.h)     W [width, K] int8, or int4 in groups
//
//   y = sum over spans, ascending, of (sum_k q[k] * W[n, k]) * scale     the inner sum an exact integer
//       scale = x's (int8; the row's weight scale multiplies the end) or x's times the group's (int4)
//
//   bytes   W once: K * (1/2 + 2/group) per int4 row, K + 2 per int8 row -> memory bound up to some 8 rows;
//           floor = bytes / read bandwidth
//   ops     2 * num_rows * width * K; floor = ops / rate of vpdpbusd (128 operations each), without it of
//           vpmaddubsw (64, int4) and vpmaddwd (32, int8)
//   map     a panel is 16 weight rows (int8_panels.h): a lane is an output. Packed weights are read as they
//           lie; of others each panel is turned into cache first.
//   few     up to kFewRows x rows: register tiles of kNarrowRows of them by one panel, of one or two by as
//           many as make kStreams, straight from memory
//   ahead   several rows ask for packed panels that come later while they compute (ahead.h)
//   many    int4 panels are widened to bytes in cache once; register tiles of kRows x rows by kCols panels,
//           kGroup panels for every tile of rows
//   speed   one core of an EPYC (Zen 4, 3.7 GHz, 2026-11-23), K = 2560, in cache, of its 472 GOP/s: 8 rows
//           420 int8, 390 int4; 48 rows 437 and 392; one row takes 105 and 65 GB/s, more than memory gives.
//           Of a plain read of memory at 47 to 50 GB/s on two cores (2026-11-30) one row takes 102 % for
//           int8, 98 % for int4 in groups of 64 and 88 % in groups of 32, panel by panel; where others use
//           half of each core 91, 79 and 74 %; by four panels at once 94 and 70 % (int8, groups of 64)
//           Several rows, from memory that gives 57 GB/s to two cores of it (2026-11-30, by turns), without
//           and with asking ahead: int8 4 rows 31 -> 39 GB/s, 8 rows 20 -> 32, 16 rows 13 -> 17; int4 2 rows
//           30 -> 39, 4 rows 20 -> 29, 8 rows 12 -> 17, 16 rows 8 -> 10. AVX2 there, at 34 GB/s: int8 4 rows
//           19 -> 30, int4 16 -> 22. One core of a Zen 3 (AVX2, 3.2 GHz, 2026-11-29), of its 414 GOP/s in
//           vpmaddubsw: 512 rows 124 int8, 190 int4. With the addition that each of them needs, vpmaddubsw
//           and vpmaddwd issue 1.5 times a cycle there and not twice: 292 GOP/s for int4 and 140 for int8,
//           the ends of spans not counted. Of a plain read of memory beside it on two cores (medians of 40)
//           one row takes 107 and 93 % by four panels at once, 83 and 81 % one by one; two rows 88 and 85 %,
//           81 and 81 % one by one
//   order   integers, then one fma per span: the same bits either way, for any number of rows, on any thread
//   source  Jacob et al. 2017, arXiv:1712.05877; Dettmers et al. 2022 (per-group absmax), arXiv:2110.02861

#include "int8_dot.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "../common/scratch.h"
#include "ahead.h"
#include "int8_panels.h"

namespace octet::cpu {
namespace {

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
constexpr int kRows = 6, kCols = 2, kNarrowRows = 8, kStreams = 1;
#elif defined(__AVX2__)
constexpr int kRows = 4, kCols = 1, kNarrowRows = 4, kStreams = 4;
#else
constexpr int kRows = 1, kCols = 1, kNarrowRows = 1, kStreams = 1;
#endif
constexpr int64_t kFewRows = 3 * kNarrowRows;
constexpr int64_t kGroup = 4;  // panels; 40 KB each at K = 2560

// kSpanSteps: span / 4. Int8 weights have one scale per row, int4 one per group of spans.
template <bool is_int4, int kSpanSteps>
struct Format {
  static constexpr bool kIsInt4 = is_int4;
  static constexpr int kSteps = kSpanSteps;
  using Element = std::conditional_t<is_int4, int8_t, ByteElement>;  // of x
  using Sums = std::conditional_t<is_int4, NibbleSums, I32x16>;
  static constexpr int kMostDots = is_int4 ? std::min(kSpanSteps, kMostNibbleDots) : kSpanSteps;  // in a sum
};

// Consecutive panels. `is_wide`: a line per step, also for int4.
struct Panels {
  const uint8_t* lines;
  const BF16* scales;
  int64_t lines_stride, scales_stride;  // from one panel to the next
  int64_t spans_per_scale;

  Panels from(int64_t panel) const {
    Panels rest = *this;
    rest.lines += panel * lines_stride;
    rest.scales += panel * scales_stride;
    return rest;
  }
};

// The bytes of two steps, of which int4 keeps one line.
template <bool is_wide>
inline void load_steps(const uint8_t* lines, Bytes64& first, Bytes64& second) {
  if constexpr (is_wide) {
    first = load_bytes(lines);
    second = load_bytes(lines + kLine);
  } else {
    split_nibbles(lines, first, second);
  }
}

// Steps in one turn of the loop over a span: all are written out, but for one row of int8. It waits for
// memory, whose prefetchers follow the few loads of a short loop better: 2 to 4 % more bytes per second on
// two cores of a Zen 4 (2026-11-30, by turns). One row of int4 is as fast either way.
constexpr int steps_per_turn(bool is_wide, int outputs, int steps) {
  return is_wide && outputs == 1 ? 4 : steps;
}

// Adds the products of one span to `sums`; kChains sums of each output in flight hide the latency of dot4.
// x: rows from the span's first column on; lines: the first panel's of the span, the others a stride apart.
template <class F, bool is_wide, int kChains, int rows, int cols>
[[gnu::always_inline]] inline void add_span(const typename F::Element* const (&x)[rows], const uint8_t* lines,
                                            int64_t lines_stride, I32x16 (&sums)[rows][cols]) {
  constexpr int kPart = std::min(F::kSteps, F::kMostDots * kChains);
  constexpr int kTurn = steps_per_turn(is_wide, rows * cols, kPart);
#pragma GCC unroll 2
  for (int part = 0; part < F::kSteps; part += kPart) {
    typename F::Sums parts[rows][cols][kChains];
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < cols; ++j) {
        begin_sums(parts[i][j][0], sums[i][j]);
        for (int c = 1; c < kChains; ++c) begin_sums(parts[i][j][c], broadcast_int(0));
      }
    }
#pragma GCC unroll 1
    for (int turn = part; turn < part + kPart; turn += kTurn) {
#pragma GCC unroll 8
      for (int step = 0; step < kTurn; step += 2, lines += is_wide ? 2 * kLine : kLine) {
        Bytes64 both[2][cols];
#pragma GCC unroll 8
        for (int j = 0; j < cols; ++j) load_steps<is_wide>(lines + j * lines_stride, both[0][j], both[1][j]);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 8
          for (int i = 0; i < rows; ++i) {
            const auto q = load_four(x[i] + (turn + step + half) * 4);
#pragma GCC unroll 8
            for (int j = 0; j < cols; ++j) {
              auto& sum = parts[i][j][(step + half) % kChains];
              sum = dot4(sum, both[half][j], q);
            }
          }
        }
      }
    }
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < cols; ++j) {
        sums[i][j] = end_sums(parts[i][j][0], sums[i][j]);
        for (int c = 1; c < kChains; ++c) {
          sums[i][j] = sums[i][j] + end_sums(parts[i][j][c], broadcast_int(0));
        }
      }
    }
  }
}

// Asks for what x will be two lines on. The weights of a panel drive a row that is read once per panel out of
// the first-level cache, and a miss there waits in line behind those that go to memory: one row of int4 reads
// 3 % more bytes per second on two cores of a Zen 4, 8 % where others use half of each core; int8 1 and 3 %
// (2026-11-30, by turns).
template <class F>
inline void ask_for_row(const typename F::Element* x) {
  const char* span = reinterpret_cast<const char*>(x) + 2 * kLine;
  for (size_t i = 0; i < F::kSteps * 4 * sizeof(*x); i += kLine) __builtin_prefetch(span + i);
}

constexpr int64_t kAhead = 8192;  // bytes; of 2048 to 32768 the best for 2 to 24 rows (Zen 4, 2026-11-30)

// Fewer rows wait for memory all the same, and faster so (one by 3 %, two of int8 by 5 %).
bool asks_ahead(const WeightView& w, int64_t num_rows) {
  return w.is_packed && num_rows >= (w.kind == WeightKind::int4 ? 2 : 3);
}

// rows x cols outputs.
template <class F, bool is_wide, int rows, int cols, int kChains>
void multiply_tile(const void* const* x_rows, const Int8Layout& layout, const Panels& panels, Ahead ahead,
                   float* out, int64_t out_stride, int64_t width) {
  constexpr int64_t kSpanLines = F::kSteps / (is_wide ? 1 : 2);
  const typename F::Element* x[rows];
  const float* x_scales[rows];
  const int32_t* corrections[rows];
  F32x16 totals[rows][cols];
  for (int i = 0; i < rows; ++i) {
    x[i] = static_cast<const typename F::Element*>(x_rows[i]);
    x_scales[i] = layout.scales(x_rows[i]);
    corrections[i] = layout.corrections(x_rows[i]);
    for (int j = 0; j < cols; ++j) totals[i][j] = zeros();
  }
  const int64_t spans = layout.spans();
  const uint8_t* lines = panels.lines;
  const BF16* scales = panels.scales;
  int64_t spans_left = panels.spans_per_scale;
  for (int64_t s = 0; s < spans; ++s, lines += kSpanLines * kLine) {
    I32x16 sums[rows][cols];
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < cols; ++j) sums[i][j] = broadcast_int(corrections[i][s]);
    }
    if constexpr (rows == 1) {
      ask_for_row<F>(x[0]);
    } else {
      ahead.ask();
    }
    add_span<F, is_wide, kChains>(x, lines, panels.lines_stride, sums);
    for (int i = 0; i < rows; ++i) x[i] += F::kSteps * 4;
    for (int j = 0; j < cols; ++j) {
      const F32x16 w_scale = F::kIsInt4 ? load(scales + j * panels.scales_stride) : broadcast(1.0f);
      for (int i = 0; i < rows; ++i) {
        const F32x16 x_scale = broadcast(x_scales[i][s]);
        totals[i][j] = fma(to_float(sums[i][j]), F::kIsInt4 ? x_scale * w_scale : x_scale, totals[i][j]);
      }
    }
    if (F::kIsInt4 && --spans_left == 0) {
      scales += kPanel;
      spans_left = panels.spans_per_scale;
    }
  }
  for (int j = 0; j < cols; ++j) {
    const int64_t left = std::min(width - j * kPanel, kPanel);
    const F32x16 w_scale = F::kIsInt4 ? broadcast(1.0f) : load(panels.scales + j * panels.scales_stride);
    for (int i = 0; i < rows; ++i) {
      store_upto(out + i * out_stride + j * kPanel, F::kIsInt4 ? totals[i][j] : totals[i][j] * w_scale, left);
    }
  }
}

// Panels of `w` from first_row on, as the weight holds them or turned into scratch.
Panels open_panels(const WeightView& w, const Int8Layout& layout, int64_t first_row, int64_t count) {
  Panels panels{nullptr, nullptr, panel_bytes(layout), panel_scales(w),
                w.kind == WeightKind::int4 ? w.group / layout.span : 1};
  if (w.is_packed) {
    panels.lines = static_cast<const uint8_t*>(w.row(first_row));
    panels.scales = w.row_scales(first_row);
    return panels;
  }
  uint8_t* lines = scratch<uint8_t>(Slot::panel, size_t(count * panels.lines_stride));
  BF16* scales = scratch<BF16>(Slot::panel_scales, size_t(count * panels.scales_stride));
  for (int64_t p = 0; p < count; ++p) {
    pack_panel(w, layout, first_row + p * kPanel, lines + p * panels.lines_stride,
               scales + p * panels.scales_stride);
  }
  panels.lines = lines;
  panels.scales = scales;
  return panels;
}

// The same panels with a line per step.
Panels widen(Panels panels, int64_t count) {
  uint8_t* wide = scratch<uint8_t>(Slot::wide_panel, size_t(2 * count * panels.lines_stride));
  for (int64_t at = 0; at < count * panels.lines_stride; at += kLine) {
    Bytes64 first, second;
    split_nibbles(panels.lines + at, first, second);
    store_bytes(wide + 2 * at, first);
    store_bytes(wide + 2 * at + kLine, second);
  }
  panels.lines = wide;
  panels.lines_stride *= 2;
  return panels;
}

// Sums of one output in flight, beside those of the tile's others.
constexpr int chains_for(int outputs) {
  return std::max(1, kDotLatency / outputs);
}

// Panels that meet a tile of so many rows side by side, each a stream of its own: where a core gets more out
// of memory by several streams than by one. More rows leave no registers for it.
constexpr int streams_for(int64_t rows) {
  return int(std::max<int64_t>(1, kStreams / rows));
}

template <class F, int cols, int... rows>
auto pick_few(int64_t num_rows, std::integer_sequence<int, rows...>) {
  static constexpr decltype(&multiply_tile<F, !F::kIsInt4, 1, cols, 1>) by_rows[] = {
      multiply_tile<F, !F::kIsInt4, rows + 1, cols, chains_for((rows + 1) * cols)>...};
  return by_rows[num_rows - 1];
}

// A tile of few rows by as many panels as `streams_for` says, or by one.
template <class F>
auto pick_few(int64_t num_rows, int64_t num_panels) {
  constexpr int one = streams_for(1), two = streams_for(2);
  if (num_panels == 1) return pick_few<F, 1>(num_rows, std::make_integer_sequence<int, kNarrowRows>());
  if (num_panels == two) return pick_few<F, two>(num_rows, std::make_integer_sequence<int, 2>());
  return pick_few<F, one>(num_rows, std::make_integer_sequence<int, 1>());
}

template <class F, int cols, int... rows>
auto pick_tile(int64_t num_rows, std::integer_sequence<int, rows...>) {
  static constexpr decltype(&multiply_tile<F, true, 1, cols, 1>) by_rows[] = {
      multiply_tile<F, true, rows + 1, cols, 1>...};
  return by_rows[num_rows - 1];
}

// Few panels at a time, each from memory once: the later tiles of rows find them in the first-level cache and
// ask for as much of the next one as the first does.
template <class F>
void multiply_few(const void* const* x_rows, int64_t num_rows, const WeightView& w, int64_t first_row,
                  int64_t width, float* out, int64_t out_stride) {
  const Int8Layout layout(w);
  const int64_t tiles = ceil_div(num_rows, kNarrowRows), rows = ceil_div(num_rows, tiles);
  for (int64_t j = 0, count = streams_for(rows); j < width; j += count * kPanel) {
    if (ceil_div(width - j, kPanel) < count) count = 1;
    const Panels panels = open_panels(w, layout, first_row + j, count);
    const int64_t size = panels.lines_stride;
    const uint8_t* later = panels.lines + size - size / tiles + kAhead;
    const bool asks = count == 1 && asks_ahead(w, num_rows);
    for (int64_t i = 0; i < num_rows; i += rows) {
      const auto run = pick_few<F>(std::min(rows, num_rows - i), count);
      const Ahead ahead = asks ? Ahead::part(later, size, i / rows, tiles, layout.spans()) : Ahead{};
      run(x_rows + i, layout, panels, ahead, out + i * out_stride + j, out_stride, width - j);
    }
  }
}

// Tile of rows by tile of rows, each in the first-level cache while it meets the panels of the group, which
// lie in the second: rows beyond those that fit there are read once per group. Meanwhile the next
// group comes.
template <class F>
void multiply_many(const void* const* x_rows, int64_t num_rows, const WeightView& w, int64_t first_row,
                   int64_t width, float* out, int64_t out_stride) {
  const Int8Layout layout(w);
  constexpr auto shapes = std::make_integer_sequence<int, kRows>();
  for (int64_t j = 0; j < width; j += kGroup * kPanel) {
    const int64_t num_panels = std::min<int64_t>(kGroup, ceil_div(width - j, kPanel));
    Panels group = open_panels(w, layout, first_row + j, num_panels);
    const int64_t size = num_panels * group.lines_stride;
    const uint8_t* later = group.lines + size;
    if (F::kIsInt4) group = widen(group, num_panels);
    const int64_t row_tiles = ceil_div(num_rows, kRows), column_tiles = ceil_div(num_panels, kCols);
    for (int64_t i = 0; i < row_tiles; ++i) {
      const int64_t row = i * kRows, count = std::min<int64_t>(kRows, num_rows - row);
      for (int64_t p = 0; p < num_panels; p += kCols) {
        const bool is_whole = num_panels - p >= kCols;
        const auto run = is_whole ? pick_tile<F, kCols>(count, shapes) : pick_tile<F, 1>(count, shapes);
        const int64_t column = j + p * kPanel, tile = i * column_tiles + p / kCols;
        Ahead ahead;
        if (w.is_packed) ahead = Ahead::part(later, size, tile, row_tiles * column_tiles, layout.spans());
        run(x_rows + row, layout, group.from(p), ahead, out + row * out_stride + column, out_stride,
            width - column);
      }
    }
  }
}

template <class F>
void multiply(const void* const* x_rows, int64_t num_rows, const WeightView& w, int64_t first_row,
              int64_t width, float* out, int64_t out_stride) {
  const auto run = num_rows <= kFewRows ? multiply_few<F> : multiply_many<F>;
  run(x_rows, num_rows, w, first_row, width, out, out_stride);
}

}  // namespace

void int8_dot(const void* const* x_rows, int64_t num_rows, const WeightView& w, int64_t first_row,
              int64_t width, float* out, int64_t out_stride) {
  if (num_rows == 0) return;
  const auto run = w.kind == WeightKind::int8 ? multiply<Format<false, 16>>
                   : Int8Layout(w).span == 64 ? multiply<Format<true, 16>>
                                              : multiply<Format<true, 8>>;
  run(x_rows, num_rows, w, first_row, width, out, out_stride);
}

}  // namespace octet::cpu

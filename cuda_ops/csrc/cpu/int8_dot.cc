// cpu/int8_dot.cc   x_rows[i] . W[n] for int8 activations and int8 or int4 weights.
//
//   x  [num_rows, K] int8 with scales per span (int8_rows.h)     W [width, K] int8, or int4 in groups
//
//   y = sum over spans, ascending, of (sum_k q[k] * W[n, k]) * scale     the inner sum an exact integer
//       scale = x's (int8; the row's weight scale multiplies the end) or x's times the group's (int4)
//
//   bytes   W once: K * (1/2 + 2/group) per int4 row, K + 2 per int8 row -> memory bound up to some 8 rows;
//           floor = bytes / read bandwidth
//   ops     2 * num_rows * width * K; floor = ops / rate of vpdpbusd (128 operations each)
//   map     a panel is 16 weight rows with four columns of each side by side: a lane is an output, and no
//           sum crosses lanes. W stays row-major in memory; a 16 x 64 block is turned in registers.
//   few     up to kFewRows x rows multiply a turned block before it leaves the registers
//   many    W's panels are turned once into cache; register tiles of kRows x rows by kCols panels
//   order   integers, then one fma per span: the same bits either way, for any number of rows, on any thread
//   source  Jacob et al. 2017, arXiv:1712.05877; Dettmers et al. 2022 (per-group absmax), arXiv:2110.02861

#include "int8_dot.h"

#include <algorithm>
#include <utility>

#include "../common/scratch.h"
#include "../common/vec_int8.h"
#include "int8_rows.h"

namespace octet::cpu {
namespace {

constexpr int64_t kPanel = 16;       // weight rows side by side
constexpr int64_t kBlock = 64;       // columns turned at a time
constexpr int64_t kBlockSteps = 16;  // four columns of kPanel rows each: 64 bytes
constexpr int64_t kBlockBytes = kPanel * kBlock;

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
constexpr int kRows = 6, kCols = 2;
#elif defined(__AVX2__)
constexpr int kRows = 2, kCols = 1;
#else
constexpr int kRows = 1, kCols = 1;
#endif

// kSpanSteps: span / 4. Int8 weights have one scale per row, int4 one per span.
template <bool is_int4, int kSpanSteps>
struct Format {
  static constexpr bool kIsInt4 = is_int4;
  static constexpr int kSteps = kSpanSteps;
  static constexpr int kSpansPerBlock = kBlockSteps / kSpanSteps;
};

// Sixteen weight rows; where the matrix has fewer left, the last one again.
struct PanelRows {
  const uint8_t* row[kPanel];
  int64_t row_bytes;

  PanelRows(const WeightView& w, int64_t first_row) : row_bytes(w.row_bytes()) {
    for (int64_t r = 0; r < kPanel; ++r) {
      row[r] = static_cast<const uint8_t*>(w.row(std::min(first_row + r, w.out_features - 1)));
    }
  }
};

// --- turning ---------------------------------------------------------------------------------------------

#if defined(__AVX512F__) && defined(__AVX512VNNI__)

inline __m512i nibbles_plus_8(__m512i words) {
  return _mm512_ternarylogic_epi32(words, _mm512_set1_epi8(15), _mm512_set1_epi8(8), 0x6a);  // (a & b) ^ c
}

// Half a row of z: dwords of row r below, of row r + 4 above.
inline __m512i load_pair(const uint8_t* low, const uint8_t* high, __mmask8 mask) {
  return _mm512_inserti32x8(_mm512_castsi256_si512(_mm256_maskz_loadu_epi32(mask, low)),
                            _mm256_maskz_loadu_epi32(mask, high), 1);
}
inline __m512i load_pair(const uint8_t* low, const uint8_t* high) {
  return _mm512_inserti32x8(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)low)),
                            _mm256_loadu_si256((const __m256i*)high), 1);
}

// steps[s] lane r = bytes 4 s .. 4 s + 3 of row r, as unsigned numbers, of the 64 columns at `block`.
template <class F>
inline void turn(const PanelRows& rows, int64_t block, __m512i (&steps)[kBlockSteps]) {
  if constexpr (F::kIsInt4) {
    const int64_t at = block * kBlock / 2;
    const bool is_whole = at + kBlock / 2 <= rows.row_bytes;
    const __mmask8 mask = is_whole ? 0xff : __mmask8((1 << (rows.row_bytes - at) / 4) - 1);
    __m512i a[8], b[8];
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        const uint8_t *low = rows.row[8 * half + i] + at, *high = rows.row[8 * half + 4 + i] + at;
        a[4 * half + i] = is_whole ? load_pair(low, high) : load_pair(low, high, mask);
      }
    }
    for (int q = 0; q < 8; q += 4) {
      const __m512i lo01 = _mm512_unpacklo_epi32(a[q], a[q + 1]),
                    hi01 = _mm512_unpackhi_epi32(a[q], a[q + 1]);
      const __m512i lo23 = _mm512_unpacklo_epi32(a[q + 2], a[q + 3]);
      const __m512i hi23 = _mm512_unpackhi_epi32(a[q + 2], a[q + 3]);
      b[q] = _mm512_unpacklo_epi64(lo01, lo23);
      b[q + 1] = _mm512_unpackhi_epi64(lo01, lo23);
      b[q + 2] = _mm512_unpacklo_epi64(hi01, hi23);
      b[q + 3] = _mm512_unpackhi_epi64(hi01, hi23);
    }
    for (int c = 0; c < 4; ++c) {
      const __m512i left = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88);
      const __m512i right = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
      steps[2 * c] = nibbles_plus_8(left);
      steps[2 * c + 1] = nibbles_plus_8(_mm512_srli_epi32(left, 4));
      steps[8 + 2 * c] = nibbles_plus_8(right);
      steps[8 + 2 * c + 1] = nibbles_plus_8(_mm512_srli_epi32(right, 4));
    }
  } else {
    const int64_t at = block * kBlock, left = rows.row_bytes - at;
    F32x16 square[kPanel];
    for (int r = 0; r < kPanel; ++r) {
      const __m512i bytes = left >= kBlock
                                ? _mm512_loadu_si512(rows.row[r] + at)
                                : _mm512_maskz_loadu_epi8((uint64_t(1) << left) - 1, rows.row[r] + at);
      square[r] = {_mm512_castsi512_ps(bytes)};
    }
    transpose(square);  // moves bits, whatever they mean
    for (int s = 0; s < kPanel; ++s) {
      steps[s] = _mm512_xor_si512(_mm512_castps_si512(square[s].v), _mm512_set1_epi8(-128));
    }
  }
}

template <class F>
void turn_block(const PanelRows& rows, int64_t block, uint8_t* out) {
  __m512i steps[kBlockSteps];
  turn<F>(rows, block, steps);
  for (int s = 0; s < kBlockSteps; ++s) _mm512_store_si512(out + 64 * s, steps[s]);
}

#else

template <class F>
void turn_block(const PanelRows& rows, int64_t block, uint8_t* out) {
  constexpr int64_t kBytes = F::kIsInt4 ? kBlock / 2 : kBlock;
  const int64_t at = block * kBytes, size = std::min(kBytes, rows.row_bytes - at);
  for (int64_t r = 0; r < kPanel; ++r) {
    uint32_t words[kBytes / 4] = {};
    std::memcpy(words, rows.row[r] + at, size_t(size));
    for (int64_t i = 0; i < kBytes / 4; ++i) {
      if constexpr (F::kIsInt4) {
        const uint32_t even = (words[i] & 0x0f0f0f0f) ^ 0x08080808;
        const uint32_t odd = (words[i] >> 4 & 0x0f0f0f0f) ^ 0x08080808;
        std::memcpy(out + (2 * i * kPanel + r) * 4, &even, 4);
        std::memcpy(out + ((2 * i + 1) * kPanel + r) * 4, &odd, 4);
      } else {
        const uint32_t unsigned_bytes = words[i] ^ 0x80808080;
        std::memcpy(out + (i * kPanel + r) * 4, &unsigned_bytes, 4);
      }
    }
  }
}

#endif

// out[s * kPanel + r] = the weight scale of span s in row r; for int8 one line, the scale of row r.
template <class F>
void turn_scales(const WeightView& w, int64_t first_row, int64_t span, float* out) {
  const int64_t groups = w.scales_per_row(), spans = F::kIsInt4 ? w.in_features / span : 1;
  const BF16* row[kPanel];
  for (int64_t r = 0; r < kPanel; ++r) row[r] = w.row_scales(std::min(first_row + r, w.out_features - 1));
  if (!F::kIsInt4) {
    for (int64_t r = 0; r < kPanel; ++r) out[r] = to_float(*row[r]);
    return;
  }
  by_sixteen(groups, [&](int64_t g, int64_t n) {
    F32x16 square[kPanel];
    for (int64_t r = 0; r < kPanel; ++r) square[r] = load_upto(row[r] + g, n);
    transpose(square);
    const int64_t repeat = spans / groups;
    for (int64_t i = 0; i < n * repeat; ++i) store(out + (g * repeat + i) * kPanel, square[i / repeat]);
  });
}

// --- products --------------------------------------------------------------------------------------------

// One span more: total + float(sum) * scale, in one rounding where there is an fma.
template <class F>
inline F32x16 add_span(F32x16 total, I32x16 sum, F32x16 x_scale, const float* weight_scales) {
  return fma(to_float(sum), F::kIsInt4 ? x_scale * load(weight_scales) : x_scale, total);
}

template <class F>
inline void finish(F32x16 total, const float* weight_scales, float* out, int64_t width) {
  store_upto(out, F::kIsInt4 ? total : total * load(weight_scales), std::min(width, kPanel));
}

// Panels in cache: `blocks` turned blocks each, and their scales.
struct Panels {
  uint8_t* blocks;
  float* scales;
  int64_t blocks_stride, scales_stride;  // from one panel to the next
};

template <class F, int rows, int cols>
void multiply_tile(const void* const* x_rows, const Int8Layout& layout, const Panels& panels, float* out,
                   int64_t out_stride, int64_t width) {
  const int8_t* x[rows];
  const float* x_scales[rows];
  const int32_t* corrections[rows];
  F32x16 totals[rows][cols];
  for (int i = 0; i < rows; ++i) {
    x[i] = layout.data(x_rows[i]);
    x_scales[i] = layout.scales(x_rows[i]);
    corrections[i] = layout.corrections(x_rows[i]);
    for (int j = 0; j < cols; ++j) totals[i][j] = zeros();
  }
  const int64_t spans = layout.spans();
  const uint8_t* weights = panels.blocks;
  for (int64_t s = 0; s < spans; ++s) {
    I32x16 sums[rows][cols];
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < cols; ++j) sums[i][j] = broadcast_int(corrections[i][s]);
    }
    for (int step = 0; step < F::kSteps; ++step, weights += 64) {
      Bytes64 four[cols];
#pragma GCC unroll 8
      for (int j = 0; j < cols; ++j) four[j] = load_bytes(weights + j * panels.blocks_stride);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const Bytes4 q = load_four(x[i] + (s * F::kSteps + step) * 4);
#pragma GCC unroll 8
        for (int j = 0; j < cols; ++j) sums[i][j] = dot4(sums[i][j], four[j], q);
      }
    }
    for (int i = 0; i < rows; ++i) {
      const F32x16 x_scale = broadcast(x_scales[i][s]);
      for (int j = 0; j < cols; ++j) {
        totals[i][j] = add_span<F>(totals[i][j], sums[i][j], x_scale,
                                   panels.scales + j * panels.scales_stride + s * kPanel);
      }
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) {
      finish<F>(totals[i][j], panels.scales + j * panels.scales_stride, out + i * out_stride + j * kPanel,
                width - j * kPanel);
    }
  }
}

template <class F, int cols, int... rows>
auto pick_tile(int64_t num_rows, std::integer_sequence<int, rows...>) {
  static constexpr decltype(&multiply_tile<F, 1, cols>) by_rows[] = {multiply_tile<F, rows + 1, cols>...};
  return by_rows[num_rows - 1];
}

template <class F>
void multiply_many(const void* const* x_rows, int64_t num_rows, const WeightView& w, int64_t first_row,
                   int64_t width, float* out, int64_t out_stride) {
  const Int8Layout layout(w);
  const int64_t blocks = ceil_div(w.in_features, kBlock), spans = layout.spans();
  const Panels panels{scratch<uint8_t>(Slot::panel, size_t(kCols * blocks * kBlockBytes)),
                      scratch<float>(Slot::panel_scales, size_t(kCols * spans * kPanel)),
                      blocks * kBlockBytes, spans * kPanel};
  for (int64_t j = 0; j < width; j += kCols * kPanel) {
    const int64_t cols = std::min<int64_t>(kCols, ceil_div(width - j, kPanel));
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t first = first_row + j + c * kPanel;
      const PanelRows rows(w, first);
      turn_scales<F>(w, first, layout.span, panels.scales + c * panels.scales_stride);
      for (int64_t b = 0; b < blocks; ++b) {
        turn_block<F>(rows, b, panels.blocks + c * panels.blocks_stride + b * kBlockBytes);
      }
    }
    constexpr auto shapes = std::make_integer_sequence<int, kRows>();
    for (int64_t i = 0; i < num_rows; i += kRows) {
      const int64_t count = std::min<int64_t>(kRows, num_rows - i);
      const auto run = cols == kCols ? pick_tile<F, kCols>(count, shapes) : pick_tile<F, 1>(count, shapes);
      run(x_rows + i, layout, panels, out + i * out_stride + j, out_stride, width - j);
    }
  }
}

#if defined(__AVX512F__) && defined(__AVX512VNNI__)

constexpr int64_t kFewRows = 6;

// Asks for the bytes that this thread will most likely read one panel later, in the order they lie.
struct Ahead {
  const uint8_t *next, *end;

  Ahead(const PanelRows& rows, const WeightView& w)
      : next(rows.row[0] + kPanel * rows.row_bytes),
        end(static_cast<const uint8_t*>(w.row(w.out_features))) {}
  void fetch(int64_t size) {
    for (int64_t i = 0; i < size && next < end; i += 64, next += 64) _mm_prefetch(next, _MM_HINT_T0);
  }
};

template <class F, int rows>
void multiply_panel(const void* const* x_rows, const WeightView& w, int64_t first_row, int64_t width,
                    float* out, int64_t out_stride) {
  const Int8Layout layout(w);
  const int64_t blocks = ceil_div(w.in_features, kBlock), spans = layout.spans();
  float* scales = scratch<float>(Slot::panel_scales, size_t(spans * kPanel));
  turn_scales<F>(w, first_row, layout.span, scales);
  const PanelRows panel(w, first_row);
  Ahead ahead(panel, w);
  F32x16 totals[rows];
  const int8_t* x[rows];
  for (int i = 0; i < rows; ++i) {
    totals[i] = zeros();
    x[i] = layout.data(x_rows[i]);
  }
  constexpr int kChains = rows == 1 ? 4 : rows <= 3 ? 2 : 1;  // four sums in flight hide the latency
  for (int64_t block = 0; block < blocks; ++block) {
    ahead.fetch(F::kIsInt4 ? kBlockBytes / 2 : kBlockBytes);
    __m512i steps[kBlockSteps];
    turn<F>(panel, block, steps);
#pragma GCC unroll 2
    for (int part = 0; part < F::kSpansPerBlock; ++part) {
      const int64_t s = block * F::kSpansPerBlock + part;
      if (s >= spans) break;
      I32x16 sums[rows][kChains];
      for (int i = 0; i < rows; ++i) {
        sums[i][0] = broadcast_int(layout.corrections(x_rows[i])[s]);
        for (int c = 1; c < kChains; ++c) sums[i][c] = broadcast_int(0);
      }
#pragma GCC unroll 16
      for (int step = 0; step < F::kSteps; ++step) {
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
          sums[i][step % kChains] = dot4(sums[i][step % kChains], {steps[part * F::kSteps + step]},
                                         load_four(x[i] + (s * F::kSteps + step) * 4));
        }
      }
      for (int i = 0; i < rows; ++i) {
        I32x16 sum = sums[i][0];
        for (int c = 1; c < kChains; ++c) sum = sum + sums[i][c];
        totals[i] = add_span<F>(totals[i], sum, broadcast(layout.scales(x_rows[i])[s]), scales + s * kPanel);
      }
    }
  }
  for (int i = 0; i < rows; ++i) finish<F>(totals[i], scales, out + i * out_stride, width);
}

template <class F, int... rows>
auto pick_panel(int64_t num_rows, std::integer_sequence<int, rows...>) {
  static constexpr decltype(&multiply_panel<F, 1>) by_rows[] = {multiply_panel<F, rows + 1>...};
  return by_rows[num_rows - 1];
}

template <class F>
void multiply_few(const void* const* x_rows, int64_t num_rows, const WeightView& w, int64_t first_row,
                  int64_t width, float* out, int64_t out_stride) {
  const auto run = pick_panel<F>(num_rows, std::make_integer_sequence<int, kFewRows>());
  for (int64_t j = 0; j < width; j += kPanel) {
    run(x_rows, w, first_row + j, width - j, out + j, out_stride);
  }
}

#else

constexpr int64_t kFewRows = 0;

template <class F>
void multiply_few(const void* const*, int64_t, const WeightView&, int64_t, int64_t, float*, int64_t) {}

#endif

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
  const auto run = w.kind == WeightKind::int8     ? multiply<Format<false, 16>>
                   : Int8Layout(w).span == kBlock ? multiply<Format<true, 16>>
                                                  : multiply<Format<true, 8>>;
  run(x_rows, num_rows, w, first_row, width, out, out_stride);
}

}  // namespace octet::cpu

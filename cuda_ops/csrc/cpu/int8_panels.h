// cpu/int8_panels.h   Panels: int8 and int4 weights in the order in which int8_dot.cc multiplies them.
//
// A panel is 16 weight rows with their words side by side. A word is 32 bits of a row: 4 columns of int8 or 8
// of int4. Line c of a panel, 64 bytes, holds word c of row r at 4 r, as unsigned numbers (int8 + 128, int4
// + 8), so a lane of vpdpbusd is an output and no sum crosses lanes. The low nibbles of an int4 line are its
// even columns, the high ones its odd columns.
//
//   lines    int8 K / 4, int4 K / 8, in order; K padded with zeros to whole spans of int8_rows.h
//   scales   int8: as they were, one per row; int4: [K / group, 16]
//
// A packed weight (cuda_ops.pack_panels) is panel after panel: it takes the very bytes of the row-major one,
// and a thread reads it as one stream. Streams matter: two cores of an EPYC (Zen 4, 2026-11-23) read 25 GB/s
// so, and 14 GB/s from 16 rows at a time.

#pragma once

#include <algorithm>
#include <cstring>

#include "../common/vec_math.h"
#include "int8_rows.h"

namespace octet::cpu {

constexpr int64_t kPanel = 16;  // rows
constexpr int64_t kLine = 64;   // bytes

// Both halves of a gated weight must be whole panels, hence 32. cuda_ops/pack.py says the same.
inline bool can_pack(const WeightView& w) {
  if (w.out_features % (2 * kPanel) != 0) return false;
  return w.kind == WeightKind::int8 ? w.in_features % 64 == 0
                                    : w.kind == WeightKind::int4 && w.group % 32 == 0;
}

// Bytes of one panel's lines, padding included.
inline int64_t panel_bytes(const Int8Layout& layout) {
  const int64_t bytes = layout.spans() * layout.span * kPanel;
  return layout.is_int4 ? bytes / 2 : bytes;
}
inline int64_t panel_scales(const WeightView& w) {
  return w.scales_per_row() * kPanel;
}

// Turns rows [first_row, first_row + 16) of a row-major weight; where it has fewer, the last one again.
inline void pack_panel(const WeightView& w, const Int8Layout& layout, int64_t first_row, uint8_t* lines,
                       BF16* scales) {
  const uint8_t* rows[kPanel];
  const BF16* row_scales[kPanel];
  for (int64_t r = 0; r < kPanel; ++r) {
    const int64_t row = std::min(first_row + r, w.out_features - 1);
    rows[r] = static_cast<const uint8_t*>(w.row(row));
    row_scales[r] = w.row_scales(row);
  }
  const int64_t row_bytes = w.row_bytes(), num_lines = panel_bytes(layout) / kLine;
  const uint32_t offset = layout.is_int4 ? 0x88888888u : 0x80808080u;
  for (int64_t c = 0; c < num_lines; c += 16) {
    const int64_t left = row_bytes - 4 * c, count = std::min<int64_t>(16, num_lines - c);
    alignas(64) uint32_t square[16][16] = {};
    F32x16 words[16];
    for (int64_t r = 0; r < kPanel; ++r) {
      if (left >= 64) {
        words[r] = load(reinterpret_cast<const float*>(rows[r] + 4 * c));
      } else {
        std::memcpy(square[r], rows[r] + 4 * c, size_t(std::max<int64_t>(left, 0)));
        words[r] = load(reinterpret_cast<const float*>(square[r]));
      }
    }
    transpose(words);  // moves bits, whatever they mean
    for (int64_t i = 0; i < count; ++i) {
      store(reinterpret_cast<float*>(square[i]), words[i]);
      for (uint32_t& word : square[i]) word ^= offset;
    }
    std::memcpy(lines + c * kLine, square, size_t(count * kLine));
  }
  const int64_t groups = w.scales_per_row();
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t r = 0; r < kPanel; ++r) scales[g * kPanel + r] = row_scales[r][g];
  }
}

}  // namespace octet::cpu

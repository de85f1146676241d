// cpu/pack.cc   A weight's rows into panels (int8_panels.h), in the memory it has.
//
//   data, scales of [count, N, K] int8 or int4; N a multiple of 32, K of 64, or of an int4 group of 32
//
//   bytes   the weight twice, from cache the second time
//   map     a task is one panel: turned into scratch, copied back
//   order   moves only

#include "../include/pack.h"

#include "../common/scratch.h"
#include "../common/thread_pool.h"
#include "int8_panels.h"

namespace octet::cpu {

Status pack_panels(const WeightView& w, void* data, BF16* scales, int64_t count) {
  if (!can_pack(w)) {
    return "only int8 weights of [32 n, 64 k] and int4 weights of 32 n rows in groups of 32 k are packed";
  }
  const Int8Layout layout(w);
  const int64_t lines_size = panel_bytes(layout), scales_size = panel_scales(w);
  parallel_for(count * w.out_features / kPanel, [&](int64_t panel) {
    const WeightView matrix = w.at(panel * kPanel / w.out_features);
    const int64_t row = panel * kPanel % w.out_features;
    uint8_t* lines = scratch<uint8_t>(Slot::panel, size_t(lines_size));
    BF16* turned = scratch<BF16>(Slot::panel_scales, size_t(scales_size));
    pack_panel(matrix, layout, row, lines, turned);
    std::memcpy(static_cast<uint8_t*>(data) + panel * lines_size, lines, size_t(lines_size));
    std::memcpy(scales + panel * scales_size, turned, size_t(scales_size) * sizeof(BF16));
  });
  return nullptr;
}

}  // namespace octet::cpu

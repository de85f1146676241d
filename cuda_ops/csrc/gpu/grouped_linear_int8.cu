// gpu/grouped_linear_int8.cu   The grouped product for int8 weights: which tile for how many rows
//
// Kernel, order and bytes are in grouped_linear.cuh. Tiles never change a bit, so these are free to tune.
//   speed   not yet measured

#include "grouped_linear.cuh"

namespace octet::gpu {
namespace {

constexpr WeightKind kKind = WeightKind::int8;
constexpr int kShort = 2048;  // inputs below which a warp has too few column tiles to hide a task's end

}  // namespace

const char* grouped_linear_int8(void* stream, const GroupedLinear& p) {
  if (p.typical_rows > 16) return launch_shape<kKind, 2, 32, 2, 1>(stream, p);
  if (p.typical_rows > 8) return launch_shape<kKind, 2, 16, 2, 2>(stream, p);
  if (p.pools[0].in_features < kShort) return launch_shape<kKind, 4, 8, 2, 2>(stream, p);
  return launch_shape<kKind, 1, 8, 5, 2>(stream, p);
}

}  // namespace octet::gpu

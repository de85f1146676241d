// gpu/grouped_linear_fp32.cu   The product of bf16 rows with fp32 weights, as good as fp32: the routers
//
// Kernel, order and bytes are in grouped_linear.cuh; a weight is three bf16 operands (tiles.cuh).
//   speed   not yet measured

#include "grouped_linear.cuh"

namespace octet::gpu {

const char* grouped_linear_fp32(void* stream, const GroupedLinear& p) {
  if (p.pools[0].is_gated) return "a gated product takes int4, int8 or bf16 weights";
  if (p.typical_rows > 8) return launch_shape<WeightKind::float32, 1, 32, 2, 1>(stream, p);
  return launch_shape<WeightKind::float32, 1, 8, 3, 1>(stream, p);
}

}  // namespace octet::gpu

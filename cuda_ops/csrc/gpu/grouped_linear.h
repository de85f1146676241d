// gpu/grouped_linear.h   What one launch of the grouped product computes (kernel: grouped_linear.cuh)

#pragma once

#include "../include/linear.h"
#include "packed_weight.h"

namespace octet::gpu {

// For every group e (an expert; a dense layer is one group) and every row r of [starts[e], starts[e + 1]):
//   y = x[inputs[r] / input_divisor] @ W_e^T         W_e is matrix e % groups_per_pool of its pool
// Without starts every group has num_rows rows; without inputs row i of group e is then x[i * num_groups +
// e], so that groups can be parts of the columns of wider rows.
//   gated:  out[outputs[r]] = silu(gate half of y) * up half of y
//   plain:  out[outputs[r]] = activation(y + bias)
// fp32 sums, one rounding to the type of out.
struct GroupedLinear {
  const void* x;          // bf16
  int64_t x_stride;       // elements from row to row
  const int32_t* inputs;  // null: r itself, but see above
  int32_t input_divisor;
  void* out;
  int64_t out_stride;
  bool out_is_float;       // fp32, else bf16
  const int32_t* outputs;  // null: r itself
  const int32_t* starts;   // device; null: num_rows rows in every group
  int32_t num_rows;        // with starts: of all groups, or a bound of it
  int32_t num_groups, groups_per_pool;
  PackedWeight pools[2];  // all of one kind and all gated or none
  const void* bias;       // bf16, null: none; plain only
  Activation activation;  // plain only
  int32_t typical_rows;   // rows a busy group has: picks the tile, never changes a result's bits
};

constexpr int32_t kMaxGroups = 256;

// Picks the kernel by kind and shape and queues it. One definition per kind, each in a file of its own.
const char* grouped_linear(void* stream, const GroupedLinear& problem);
const char* grouped_linear_int4(void* stream, const GroupedLinear& problem);
const char* grouped_linear_int8(void* stream, const GroupedLinear& problem);
const char* grouped_linear_bf16(void* stream, const GroupedLinear& problem);
const char* grouped_linear_fp32(void* stream, const GroupedLinear& problem);

}  // namespace octet::gpu

// gpu/repeat.cu   Memory filled with a repeated block of bytes
//
//   out[i, j] = block[(first_row + i) % rows, (first_column + j) % columns]
//
//   bytes   n * width written, the block stays in L2   -> write bandwidth bound
//   map     a thread per four bytes, grid over all rows
//   needs   width % 4 == 0, rows of four-byte alignment; n may be 0
//   order   no sums                                                              twin  cpu/repeat.cc
//   speed   not yet measured

#include <launch.cuh>

#include "launchers.h"

namespace octet::gpu {
namespace {

constexpr int kThreads = 256;

__global__ void repeat_block_kernel(const uint8_t* block, int64_t rows, int64_t columns, int64_t first_row,
                                    int64_t first_column, uint32_t* out, int64_t words, int64_t total) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= total) return;
  const int64_t i = index / words, j = index % words * 4;
  const uint8_t* row = block + (first_row + i) % rows * columns;
  uint32_t word = 0;
  for (int byte = 0; byte < 4; ++byte) {
    word |= uint32_t(row[(first_column + j + byte) % columns]) << (8 * byte);
  }
  out[index] = word;
}

}  // namespace

Status repeat_block(Stream stream, const uint8_t* block, int64_t rows, int64_t columns, int64_t first_row,
                    int64_t first_column, uint8_t* out, int64_t n, int64_t width) {
  if (width % 4 != 0) return "a row must be a multiple of 4 bytes";
  const int64_t total = n * width / 4;
  if (total == 0) return nullptr;
  return launch({"repeat_block", dim3(unsigned((total + kThreads - 1) / kThreads)), kThreads, 0, stream},
                repeat_block_kernel, block, rows, columns, first_row, first_column,
                reinterpret_cast<uint32_t*>(out), width / 4, total);
}

}  // namespace octet::gpu

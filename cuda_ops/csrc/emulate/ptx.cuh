// emulate/ptx.cuh   Host twins of the instructions in gpu/ptx.cuh, same names and arguments
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace octet::gpu::ptx {

namespace host {

EMULATE_PLAIN inline void check_read(const void* address, std::size_t size) {
  emulate::Thread* self = emulate::running();
  self->block->check_shared(*self, &emulate::SharedMemory::read, address, size);
}

struct Matrices {
  const void* row;
  std::uint32_t* registers;
};

// Lane l brings the address of row l % 8 of matrix l / 8; every lane receives, of each matrix, two
// neighbours: of row l / 4 at columns 2 (l % 4), or of the transposed matrix.
template <int count, bool transposed>
EMULATE_PLAIN void complete_ldmatrix(emulate::LaneCall* const lanes[32], std::uint32_t) {
  unsigned short tiles[count][8][8];
  for (int i = 0; i < 8 * count; ++i) {
    std::memcpy(tiles[i / 8][i % 8], static_cast<const Matrices*>(lanes[i]->in)->row, 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    std::uint32_t* registers = static_cast<const Matrices*>(lanes[lane]->in)->registers;
    const int row = lane / 4, column = lane % 4 * 2;
    for (int m = 0; m < count; ++m) {
      const std::uint32_t low = transposed ? tiles[m][column][row] : tiles[m][row][column];
      const std::uint32_t high = transposed ? tiles[m][column + 1][row] : tiles[m][row][column + 1];
      registers[m] = low | high << 16;
    }
  }
}

template <int count, bool transposed>
EMULATE_PLAIN inline void ldmatrix(std::uint32_t* registers, const void* row, const char* name) {
  if (emulate::lane() < 8u * count) {
    check_read(row, 16);
    emulate::running()->block->note(*emulate::running(), __builtin_return_address(0), row, 16);
  }
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) {
    emulate::running()->block->fail(*emulate::running(), std::string(name) + " from an unaligned address");
  }
  const Matrices in{row, registers};
  int nothing = 0;
  emulate::meet(&complete_ldmatrix<count, transposed>, name, 0xffffffffu, in, nothing);
}

struct Product {
  const std::uint32_t *a, *b;
};

EMULATE_PLAIN inline float low_half(std::uint32_t pair) {
  return __uint_as_float(pair << 16);
}
EMULATE_PLAIN inline float high_half(std::uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

// d[16,8] += a[16,16] b[16,8]: each sum starts from d and takes k = 0..15 in ascending order, in fp32.
EMULATE_PLAIN inline void complete_mma(emulate::LaneCall* const lanes[32], std::uint32_t) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& in = *static_cast<const Product*>(lanes[lane]->in);
    const auto* out = static_cast<const float*>(lanes[lane]->out);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8, column = t + i / 2 * 8;
      a[row][column] = low_half(in.a[i]);
      a[row][column + 1] = high_half(in.a[i]);
      d[g + i / 2 * 8][t + i % 2] = out[i];
    }
    for (int i = 0; i < 2; ++i) {
      b[t + i * 8][g] = low_half(in.b[i]);
      b[t + i * 8 + 1][g] = high_half(in.b[i]);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* out = static_cast<float*>(lanes[lane]->out);
    for (int i = 0; i < 4; ++i) out[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace host

EMULATE_PLAIN inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
  host::ldmatrix<4, false>(r, row, "ldmatrix.x4");
}
EMULATE_PLAIN inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* row) {
  host::ldmatrix<4, true>(r, row, "ldmatrix.x4.trans");
}

EMULATE_PLAIN inline void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  const host::Product in{a, b};
  emulate::meet(&host::complete_mma, "mma.sync", 0xffffffffu, in, d);
}

EMULATE_PLAIN inline void copy_async_16(void* to, const void* from, bool is_valid) {
  emulate::Thread* self = emulate::running();
  emulate::check_global_read(from, is_valid ? 16 : 0);
  self->block->copy_async(*self, {to, from, 16, is_valid ? 16u : 0u}, __builtin_return_address(0));
}
EMULATE_PLAIN inline void copy_async_commit() {
  emulate::Thread* self = emulate::running();
  self->block->commit_copies(*self);
}
template <int may_remain>
EMULATE_PLAIN inline void copy_async_wait() {
  emulate::Thread* self = emulate::running();
  self->block->wait_copies(*self, may_remain);
}

inline uint4 load_once(const uint4* place) {
  return *place;
}

EMULATE_PLAIN inline std::uint32_t subtract_bf16x2(std::uint32_t a, std::uint32_t b) {
  const std::uint32_t low = __float2bfloat16(host::low_half(a) - host::low_half(b)).bits;
  const std::uint32_t high = __float2bfloat16(host::high_half(a) - host::high_half(b)).bits;
  return low | high << 16;
}

inline float exp2_fast(float x) {
  return std::exp2(x);
}

EMULATE_PLAIN inline std::uint32_t load_flag(const std::uint32_t* flag) {
  emulate::Thread* self = emulate::running();
  emulate::check_global_read(flag, 4);
  const std::uint32_t value = __atomic_load_n(flag, __ATOMIC_ACQUIRE);
  self->block->yield(*self);  // whoever sets the flag may be a thread that waits for this processor
  return value;
}
EMULATE_PLAIN inline void store_flag(std::uint32_t* flag, std::uint32_t value) {
  emulate::check_atomic(flag, 4);
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
}

}  // namespace octet::gpu::ptx

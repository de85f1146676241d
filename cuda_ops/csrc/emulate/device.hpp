// emulate/device.hpp   The part of CUDA's language and runtime that our kernels use, for the host compiler
//
// Functions marked EMULATE_PLAIN are the machine itself: the hooks do not watch their own memory accesses,
// they report what they touch on behalf of the thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// ---- types ----

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };

// ---- where a thread is ----

namespace emulate {

// Runs every block; false if one of them went wrong, which octet_emulator_report() then tells.
bool run_grid(const Grid& grid, const Body& body);

EMULATE_PLAIN inline dim3 thread_index() {
  const Index3& i = running()->index;
  return {i.x, i.y, i.z};
}
EMULATE_PLAIN inline dim3 block_index() {
  const Index3 i = running()->block->index();
  return {i.x, i.y, i.z};
}
EMULATE_PLAIN inline dim3 block_size() {
  const Index3& i = running()->block->grid().block;
  return {i.x, i.y, i.z};
}
EMULATE_PLAIN inline dim3 grid_size() {
  const Index3& i = running()->block->grid().grid;
  return {i.x, i.y, i.z};
}

EMULATE_PLAIN inline void* static_shared(const void* tag, std::size_t size) {
  return running()->block->shared().fixed(tag, size);
}
EMULATE_PLAIN inline void* dynamic_shared() {
  return running()->block->shared().dynamic();
}

}  // namespace emulate

#define threadIdx (::emulate::thread_index())
#define blockIdx (::emulate::block_index())
#define blockDim (::emulate::block_size())
#define gridDim (::emulate::grid_size())

// ---- barriers ----

namespace emulate {

EMULATE_PLAIN inline int sync_threads(int value, int (*combine)(int, int), const char* file, int line) {
  Thread* self = running();
  return self->block->barrier(*self, value, combine, file, line);
}
EMULATE_PLAIN inline int combine_or(int a, int b) {
  return (a != 0) | (b != 0);
}
EMULATE_PLAIN inline int combine_and(int a, int b) {
  return (a != 0) & (b != 0);
}
EMULATE_PLAIN inline int combine_count(int a, int b) {
  return a + b;
}

}  // namespace emulate

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulate::sync_threads(0, emulate::combine_or, file, line);
}
inline int __syncthreads_or(int value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return emulate::sync_threads(value, emulate::combine_or, file, line);
}
inline int __syncthreads_and(int value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return emulate::sync_threads(value, emulate::combine_and, file, line);
}
inline int __syncthreads_count(int value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return emulate::sync_threads(value != 0, emulate::combine_count, file, line);
}

// ---- warp operations ----

namespace emulate {

// All lanes of `mask` meet; the last one runs Operation on everybody's input and output.
template <class In, class Out>
EMULATE_PLAIN inline void meet(void (*complete)(LaneCall* const[32], std::uint32_t), const char* name,
                               std::uint32_t mask, const In& in, Out& out) {
  Thread* self = running();
  LaneCall call{complete, name, mask, &in, &out};
  self->block->warp_call(*self, call);
}

template <class T>
struct Shuffle {
  T value;
  unsigned from;  // lane to read
};

template <class T>
EMULATE_PLAIN void complete_shuffle(LaneCall* const lanes[32], std::uint32_t) {
  for (int i = 0; i < 32; ++i) {
    if (lanes[i] == nullptr) continue;
    const unsigned from = static_cast<const Shuffle<T>*>(lanes[i]->in)->from & 31;
    const LaneCall* source = lanes[from] ? lanes[from] : lanes[i];  // an absent lane's value is undefined
    *static_cast<T*>(lanes[i]->out) = static_cast<const Shuffle<T>*>(source->in)->value;
  }
}
template <class T>
EMULATE_PLAIN T shuffle(std::uint32_t mask, T value, unsigned from, const char* name) {
  const Shuffle<T> in{value, from};
  T out;
  meet(&complete_shuffle<T>, name, mask, in, out);
  return out;
}
EMULATE_PLAIN inline unsigned lane() {
  return running()->linear % 32;
}

EMULATE_PLAIN inline void complete_ballot(LaneCall* const lanes[32], std::uint32_t) {
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) {
    if (lanes[i] && *static_cast<const int*>(lanes[i]->in)) bits |= 1u << i;
  }
  for (int i = 0; i < 32; ++i) {
    if (lanes[i]) *static_cast<unsigned*>(lanes[i]->out) = bits;
  }
}
EMULATE_PLAIN inline void complete_sync(LaneCall* const[32], std::uint32_t) {}

template <unsigned (*Combine)(unsigned, unsigned)>
EMULATE_PLAIN void complete_reduce(LaneCall* const lanes[32], std::uint32_t) {
  bool is_first = true;
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) {
    if (!lanes[i]) continue;
    const unsigned value = *static_cast<const unsigned*>(lanes[i]->in);
    result = is_first ? value : Combine(result, value);
    is_first = false;
  }
  for (int i = 0; i < 32; ++i) {
    if (lanes[i]) *static_cast<unsigned*>(lanes[i]->out) = result;
  }
}
EMULATE_PLAIN inline unsigned add_u32(unsigned a, unsigned b) {
  return a + b;
}
EMULATE_PLAIN inline unsigned max_u32(unsigned a, unsigned b) {
  return a > b ? a : b;
}
EMULATE_PLAIN inline unsigned min_u32(unsigned a, unsigned b) {
  return a < b ? a : b;
}

}  // namespace emulate

template <class T>
EMULATE_PLAIN T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const unsigned lane = emulate::lane();
  return emulate::shuffle(mask, value, (lane & ~(width - 1)) | (from & (width - 1)), "__shfl_sync");
}
template <class T>
EMULATE_PLAIN T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned lane = emulate::lane(), from = lane ^ bits;
  return emulate::shuffle(mask, value, (from ^ lane) < unsigned(width) ? from : lane, "__shfl_xor_sync");
}
template <class T>
EMULATE_PLAIN T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned lane = emulate::lane();
  return emulate::shuffle(mask, value, (lane & (width - 1)) + by < unsigned(width) ? lane + by : lane,
                          "__shfl_down_sync");
}
template <class T>
EMULATE_PLAIN T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned lane = emulate::lane();
  return emulate::shuffle(mask, value, (lane & (width - 1)) >= by ? lane - by : lane, "__shfl_up_sync");
}
EMULATE_PLAIN inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned out = 0;
  emulate::meet(&emulate::complete_ballot, "__ballot_sync", mask, predicate, out);
  return out;
}
EMULATE_PLAIN inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
EMULATE_PLAIN inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, !predicate) == 0;
}
EMULATE_PLAIN inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  unsigned out = 0;
  emulate::meet(&emulate::complete_reduce<emulate::add_u32>, "__reduce_add_sync", mask, value, out);
  return out;
}
EMULATE_PLAIN inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  unsigned out = 0;
  emulate::meet(&emulate::complete_reduce<emulate::max_u32>, "__reduce_max_sync", mask, value, out);
  return out;
}
EMULATE_PLAIN inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  unsigned out = 0;
  emulate::meet(&emulate::complete_reduce<emulate::min_u32>, "__reduce_min_sync", mask, value, out);
  return out;
}
EMULATE_PLAIN inline void __syncwarp(unsigned mask = 0xffffffffu) {
  int nothing = 0;
  emulate::meet(&emulate::complete_sync, "__syncwarp", mask, nothing, nothing);
}

// ---- atomics and fences: blocks may run on several OS threads ----

namespace emulate {

// Reports what an atomic touches, as the hooks do for ordinary accesses.
void check_atomic(const void* address, std::size_t size);
void check_global_read(const void* address, std::size_t size);

template <class T, class Change>
EMULATE_PLAIN T change_atomically(T* place, Change change) {
  check_atomic(place, sizeof(T));
  T before, after;
  __atomic_load(place, &before, __ATOMIC_RELAXED);
  do {
    after = change(before);
  } while (!__atomic_compare_exchange(place, &before, &after, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
  return before;
}

}  // namespace emulate

template <class T>
EMULATE_PLAIN T atomicAdd(T* place, T value) {
  return emulate::change_atomically(place, [value](T old) EMULATE_PLAIN { return T(old + value); });
}
template <class T>
EMULATE_PLAIN T atomicMax(T* place, T value) {
  return emulate::change_atomically(place,
                                    [value](T old) EMULATE_PLAIN { return old > value ? old : value; });
}
template <class T>
EMULATE_PLAIN T atomicMin(T* place, T value) {
  return emulate::change_atomically(place,
                                    [value](T old) EMULATE_PLAIN { return old < value ? old : value; });
}
template <class T>
EMULATE_PLAIN T atomicOr(T* place, T value) {
  return emulate::change_atomically(place, [value](T old) EMULATE_PLAIN { return T(old | value); });
}
template <class T>
EMULATE_PLAIN T atomicExch(T* place, T value) {
  return emulate::change_atomically(place, [value](T) EMULATE_PLAIN { return value; });
}
template <class T>
EMULATE_PLAIN T atomicCAS(T* place, T expected, T value) {
  return emulate::change_atomically(place,
                                    [=](T old) EMULATE_PLAIN { return old == expected ? value : old; });
}
EMULATE_PLAIN inline void __threadfence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
EMULATE_PLAIN inline void __threadfence_block() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
EMULATE_PLAIN inline void __threadfence_system() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

// ---- arithmetic ----

EMULATE_PLAIN inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
EMULATE_PLAIN inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
EMULATE_PLAIN inline int __float_as_int(float value) {
  return int(__float_as_uint(value));
}
EMULATE_PLAIN inline float __int_as_float(int bits) {
  return __uint_as_float(unsigned(bits));
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline int __clz(int bits) {
  return bits ? __builtin_clz(unsigned(bits)) : 32;
}
// Byte i of the result is byte (selector >> 4 i & 7) of the eight bytes of high:low.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const std::uint64_t bytes = std::uint64_t(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return unsigned(std::uint64_t(a) * b >> 32);
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
using std::isfinite;
using std::isnan;
inline int min(int a, int b) {
  return a < b ? a : b;
}
inline int max(int a, int b) {
  return a > b ? a : b;
}
inline std::int64_t min(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}
inline std::int64_t max(std::int64_t a, std::int64_t b) {
  return a > b ? a : b;
}
inline unsigned min(unsigned a, unsigned b) {
  return a < b ? a : b;
}
inline unsigned max(unsigned a, unsigned b) {
  return a > b ? a : b;
}
template <class T>
inline T __ldg(const T* place) {
  return *place;
}

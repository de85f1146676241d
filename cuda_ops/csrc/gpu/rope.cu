// gpu/rope.cu   Rotary embeddings of the decoder, with the KV write, and of the vision tower
//
//   rope_angles    angle[m, i] = positions[axis[i], m] * inv_freq[i]; cos_sin holds its cosine and sine
//   rope_write_kv  adjacent pairs (2i, 2i + 1) of q and k turned by angle i; k and v go to their slot
//   rope_write_int8  the same into a cache of int8: k (turned) and v with a scale per token and head
//   vision_rope    pairs (d, d + head_dim / 2), in place: row angles for the first half of d, then column
//                  angles; angle j of an axis is position * theta^(-2j / (head_dim / 2))
//
//   bytes   qkv read once, q, k, v written once   -> bandwidth bound; cos_sin is shared by all heads (L1)
//   map     rope_write_kv: a thread per eight values, grid over all rows; the others a thread per pair
//   needs   head_dim % 8 == 0 (vision: % 4), 16-byte aligned rows; slots inside the cache or -1; M may be 0
//   order   no sums: each element depends on its pair alone (int8: and on its head's largest)
//   source  Su et al. 2021, arXiv:2104.09864                      twin  cpu/rope.cc
//   speed   not yet measured

#include <cmath>

#include "launchers.h"
#include "quantize.cuh"

namespace octet::gpu {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    rope_angles_kernel(const int32_t* positions, const int32_t* axis, const float* inv_freq, float* cos_sin,
                       int64_t m, int pairs) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= m * pairs) return;
  const int64_t row = i / pairs;
  const int pair = int(i % pairs);
  const float angle = float(positions[axis[pair] * m + row]) * inv_freq[pair];
  // The precise functions: positions reach 131072 radians, where the fast ones lose every digit.
  cos_sin[i * 2] = cosf(angle);
  cos_sin[i * 2 + 1] = sinf(angle);
}

struct RopeShape {
  int num_heads, num_kv_heads, head_dim, block_size;
};

__device__ __forceinline__ Eight turned(const Eight& x, const Eight& cos_sin) {
  Eight y;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const float a = x.value[j], b = x.value[j + 1], c = cos_sin.value[j], s = cos_sin.value[j + 1];
    y.value[j] = a * c - b * s;
    y.value[j + 1] = b * c + a * s;
  }
  return y;
}

// The cache row of a slot and KV head, in head_dim elements.
__device__ __forceinline__ int64_t cache_row(const RopeShape& shape, int slot, int kv_head) {
  const int64_t block = slot / shape.block_size, offset = slot % shape.block_size;
  return (block * shape.num_kv_heads + kv_head) * shape.block_size + offset;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    rope_write_kv_kernel(const T* qkv, const float* cos_sin, const int32_t* slots, T* k_cache, T* v_cache,
                         T* q_out, int64_t num_pieces, RopeShape shape) {
  const int64_t piece = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (piece >= num_pieces) return;
  const int width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
  const int64_t row = piece * 8 / width;
  const int column = int(piece * 8 % width), head = column / shape.head_dim, d = column % shape.head_dim;
  Eight v = load_eight(qkv + row * width + column);
  const int kv_head = head - shape.num_heads;
  if (kv_head < shape.num_kv_heads) v = turned(v, load_eight(cos_sin + row * shape.head_dim + d));
  if (kv_head < 0) {
    store_eight(q_out + (row * shape.num_heads + head) * shape.head_dim + d, v);
    return;
  }
  const int slot = slots[row];
  if (slot < 0) return;
  T* cache = kv_head < shape.num_kv_heads ? k_cache : v_cache;
  store_eight(cache + cache_row(shape, slot, kv_head % shape.num_kv_heads) * shape.head_dim + d, v);
}

// head_dim / 8 neighbouring lanes hold one head: they agree on its largest value. No lane leaves early.
__global__ void __launch_bounds__(kThreads)
    rope_write_int8_kernel(const bf16* qkv, const float* cos_sin, const int32_t* slots,
                           const Int8Caches caches, bf16* q_out, int64_t num_pieces, RopeShape shape) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t piece = min(index, num_pieces - 1);
  const int width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
  const int64_t row = piece * 8 / width;
  const int column = int(piece * 8 % width), head = column / shape.head_dim, d = column % shape.head_dim;
  Eight v = load_eight(qkv + row * width + column);
  const int kv_head = head - shape.num_heads, lanes = shape.head_dim / 8;
  if (kv_head < shape.num_kv_heads) v = turned(v, load_eight(cos_sin + row * shape.head_dim + d));
  float largest = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(v.value[j]));
  for (int step = lanes / 2; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  if (index >= num_pieces) return;
  if (kv_head < 0) {
    store_eight(q_out + (row * shape.num_heads + head) * shape.head_dim + d, v);
    return;
  }
  const int slot = slots[row];
  if (slot < 0) return;
  const bool is_key = kv_head < shape.num_kv_heads;
  const int64_t place = cache_row(shape, slot, kv_head % shape.num_kv_heads);
  const bf16 stored = scale_for(largest, 127);
  const float scale = __bfloat162float(stored);
  if (d == 0) reinterpret_cast<bf16*>(is_key ? caches.k_scales : caches.v_scales)[place] = stored;
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    words[j / 4] |= uint32_t(quantized(v.value[j], scale, 127) & 255) << (j % 4 * 8);
  }
  int8_t* cache = is_key ? caches.k : caches.v;
  *reinterpret_cast<uint2*>(cache + place * shape.head_dim + d) = make_uint2(words[0], words[1]);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    vision_rope_kernel(T* qkv, const int32_t* row_col, float log2_theta, int64_t num_pairs, int heads,
                       int head_dim) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= num_pairs) return;
  const int half = head_dim / 2, quarter = head_dim / 4;
  const int d = int(i % half), head = int(i / half % (2 * heads));  // q heads, then k heads
  const int64_t row = i / half / (2 * heads);
  const float inv_freq = exp2f(-2.0f * float(d % quarter) / float(half) * log2_theta);
  const float angle = float(row_col[row * 2 + d / quarter]) * inv_freq;
  const float c = cosf(angle), s = sinf(angle);
  T* x = qkv + (row * 3 * heads + head) * head_dim + d;
  const float a = load_one(x), b = load_one(x + half);
  store_one(x, a * c - b * s);
  store_one(x + half, b * c + a * s);
}

}  // namespace

Status rope_angles(Stream stream, const int32_t* positions, const int32_t* axis, const float* inv_freq,
                   float* cos_sin, int64_t m, int64_t pairs) {
  if (m * pairs == 0) return nullptr;
  return launch({"rope_angles", dim3(unsigned(ceil_div(m * pairs, kThreads))), kThreads, 0, stream},
                rope_angles_kernel, positions, axis, inv_freq, cos_sin, m, int(pairs));
}

Status rope_write_kv(Stream stream, DType type, const void* qkv, const float* cos_sin, const int32_t* slots,
                     void* k_cache, void* v_cache, void* q_out, int64_t m, int64_t num_heads,
                     const octet::cpu::KvShape& kv) {
  if (kv.head_dim % 8 != 0) return "head_dim must be a multiple of 8";
  const RopeShape shape{int(num_heads), int(kv.num_kv_heads), int(kv.head_dim), int(kv.block_size)};
  const int64_t num_pieces = m * (num_heads + 2 * kv.num_kv_heads) * kv.head_dim / 8;
  if (num_pieces == 0) return nullptr;
  return with_element(type, [&](auto t) {
    using T = decltype(t);
    return launch({"rope_write_kv", dim3(unsigned(ceil_div(num_pieces, kThreads))), kThreads, 0, stream},
                  rope_write_kv_kernel<T>, static_cast<const T*>(qkv), cos_sin, slots,
                  static_cast<T*>(k_cache), static_cast<T*>(v_cache), static_cast<T*>(q_out), num_pieces,
                  shape);
  });
}

Status rope_write_int8(Stream stream, const void* qkv, const float* cos_sin, const int32_t* slots,
                       const Int8Caches& caches, void* q_out, int64_t m, int64_t num_heads,
                       const octet::cpu::KvShape& kv) {
  if (kv.head_dim < 8 || kv.head_dim > 256 || kv.head_dim & (kv.head_dim - 1))
    return "head_dim must be a power of two from 8 to 256 for an int8 cache";
  const RopeShape shape{int(num_heads), int(kv.num_kv_heads), int(kv.head_dim), int(kv.block_size)};
  const int64_t num_pieces = m * (num_heads + 2 * kv.num_kv_heads) * kv.head_dim / 8;
  if (num_pieces == 0) return nullptr;
  return launch({"rope_write_int8", dim3(unsigned(ceil_div(num_pieces, kThreads))), kThreads, 0, stream},
                rope_write_int8_kernel, static_cast<const bf16*>(qkv), cos_sin, slots, caches,
                static_cast<bf16*>(q_out), num_pieces, shape);
}

Status vision_rope(Stream stream, DType type, void* qkv, const int32_t* row_col, float theta, int64_t p,
                   int64_t heads, int64_t head_dim) {
  if (head_dim % 4 != 0) return "head_dim must be a multiple of 4";
  const int64_t num_pairs = p * 2 * heads * (head_dim / 2);
  if (num_pairs == 0) return nullptr;
  return with_element(type, [&](auto t) {
    using T = decltype(t);
    return launch({"vision_rope", dim3(unsigned(ceil_div(num_pairs, kThreads))), kThreads, 0, stream},
                  vision_rope_kernel<T>, static_cast<T*>(qkv), row_col, std::log2(theta), num_pairs,
                  int(heads), int(head_dim));
  });
}

}  // namespace octet::gpu

// gpu/rope.cu   Rotary embeddings of the decoder, with the KV write, and of the vision tower
//
//   rope_angles    angle[m, i] = positions[axis[i], m] * inv_freq[i]; cos_sin holds its cosine and sine
//   rope_write_kv  adjacent pairs (2i, 2i + 1) of q and k turned by angle i; k and v go to their slot
//   vision_rope    pairs (d, d + head_dim / 2), in place: row angles for the first half of d, then column
//                  angles; angle j of an axis is position * theta^(-2j / (head_dim / 2))
//
//   bytes   qkv read once, q, k, v written once   -> bandwidth bound; cos_sin is shared by all heads (L1)
//   map     rope_write_kv: a thread per eight values, grid over all rows; the others a thread per pair
//   needs   head_dim % 8 == 0 (vision: % 4), 16-byte aligned rows; slots inside the cache or -1; M may be 0
//   order   no sums: each element depends on its pair alone
//   source  Su et al. 2021, arXiv:2104.09864                      twin  cpu/rope.cc
//   speed   not yet measured

#include <cmath>

#include "elements.cuh"
#include "launchers.h"

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
  const int64_t block = slot / shape.block_size, offset = slot % shape.block_size;
  const int64_t place =
      (block * shape.num_kv_heads + kv_head % shape.num_kv_heads) * shape.block_size + offset;
  store_eight(cache + place * shape.head_dim + d, v);
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

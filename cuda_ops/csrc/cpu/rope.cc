// cpu/rope.cc   Rotary embeddings in fp32.
//
//   rope_angles     angle[m, i] = positions[axis[i], m] * inv_freq[i]; cos_sin holds its cosine and sine
//   rope_write_kv   adjacent pairs (2i, 2i + 1) of q and k turned by angle i; k and v written to their slot:
//   as
//                   they are, or int8 with a scale per token and head, bf16(max|x| / 127), 1 for all zeros
//   vision_rope     half-split pairs (d, d + head_dim / 2): row angles for the first half of d, then column
//                   angles; angle j of an axis is position * theta^(-2j / (head_dim / 2))
//
//   bytes   everything once   -> bandwidth bound
//   map     rows over threads
//   needs   head_dim even (vision: a multiple of 4); slots inside the cache; M may be 0
//   order   no sums: each element depends on its pair alone (int8: and on its head's largest)
//   source  Su et al. 2021, arXiv:2104.09864

#include "../include/rope.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/scratch.h"
#include "../common/thread_pool.h"
#include "../common/vec_math.h"

namespace octet::cpu {
namespace {

template <class T>
void rotate_adjacent(const T* x, const float* cos_sin, T* out, int64_t head_dim) {
  by_sixteen(head_dim, [&](int64_t i, int64_t n) {
    store_upto(out + i, turn_pairs(load_upto(x + i, n), load_upto(cos_sin + i, n)), n);
  });
}

template <class T>
void rotate_half_split(T* x, const float* cosines, const float* sines, int64_t half) {
  for (int64_t d = 0; d < half; ++d) {
    const float a = to_float(x[d]), b = to_float(x[d + half]);
    assign(x[d], a * cosines[d] - b * sines[d]);
    assign(x[d + half], b * cosines[d] + a * sines[d]);
  }
}

// x [head_dim] as int8, each value to its nearest multiple of the scale, halves away from zero.
BF16 write_int8(const float* x, int64_t head_dim, int8_t* out) {
  float largest = 0.0f;
  for (int64_t d = 0; d < head_dim; ++d) largest = std::max(largest, std::fabs(x[d]));
  const BF16 rounded = to_bf16(largest / 127.0f);
  const BF16 scale = to_float(rounded) > 0.0f ? rounded : to_bf16(1.0f);
  for (int64_t d = 0; d < head_dim; ++d) {
    out[d] = int8_t(std::clamp(std::round(x[d] / to_float(scale)), -127.0f, 127.0f));
  }
  return scale;
}

// One head of K (turned) and V into its place of the cache.
template <class T>
void write_head(const T* k, const T* v, const float* cos_sin, int64_t place, const KvCache& cache,
                int64_t head_dim) {
  const int64_t at = place * head_dim;
  if (!cache.k_scales) {
    rotate_adjacent(k, cos_sin, static_cast<T*>(cache.k) + at, head_dim);
    std::memcpy(static_cast<T*>(cache.v) + at, v, size_t(head_dim) * sizeof(T));
    return;
  }
  float* row = scratch<float>(Slot::values, size_t(head_dim));
  for (int64_t d = 0; d < head_dim; ++d) row[d] = to_float(k[d]);
  rotate_adjacent(row, cos_sin, row, head_dim);
  cache.k_scales[place] = write_int8(row, head_dim, static_cast<int8_t*>(cache.k) + at);
  for (int64_t d = 0; d < head_dim; ++d) row[d] = to_float(v[d]);
  cache.v_scales[place] = write_int8(row, head_dim, static_cast<int8_t*>(cache.v) + at);
}

template <class T>
void write_row(const T* qkv, const float* cos_sin, int64_t slot, const KvCache& cache, T* q_out,
               int64_t num_heads, const KvShape& kv) {
  const int64_t hd = kv.head_dim;
  for (int64_t h = 0; h < num_heads; ++h) rotate_adjacent(qkv + h * hd, cos_sin, q_out + h * hd, hd);
  const T* k = qkv + num_heads * hd;
  const T* v = k + kv.num_kv_heads * hd;
  const int64_t block = slot / kv.block_size, offset = slot % kv.block_size;
  for (int64_t h = 0; h < kv.num_kv_heads; ++h) {
    const int64_t place = (block * kv.num_kv_heads + h) * kv.block_size + offset;
    write_head(k + h * hd, v + h * hd, cos_sin, place, cache, hd);
  }
}

}  // namespace

Status rope_angles(const int32_t* positions, const int32_t* axis, const float* inv_freq, float* cos_sin,
                   int64_t m, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    if (axis[i] < 0 || axis[i] > 2) return "axis must hold 0 (t), 1 (h) or 2 (w)";
  }
  parallel_slices(m, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t i = 0; i < pairs; ++i) {
        const float angle = float(positions[axis[i] * m + r]) * inv_freq[i];
        cos_sin[(r * pairs + i) * 2] = std::cos(angle);
        cos_sin[(r * pairs + i) * 2 + 1] = std::sin(angle);
      }
    }
  });
  return nullptr;
}

Status rope_write_kv(DType type, const void* qkv, const float* cos_sin, const int32_t* slots,
                     const KvCache& cache, void* q_out, int64_t m, int64_t num_heads, const KvShape& kv) {
  for (int64_t r = 0; r < m; ++r) {
    if (slots[r] < 0 || slots[r] >= kv.num_blocks * kv.block_size)
      return "slots must lie inside the KV cache";
  }
  const int64_t hd = kv.head_dim, width = (num_heads + 2 * kv.num_kv_heads) * hd;
  return with_type(type, [&](auto t) -> Status {
    using T = decltype(t);
    parallel_slices(m, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        write_row((const T*)qkv + r * width, cos_sin + r * hd, slots[r], cache,
                  (T*)q_out + r * num_heads * hd, num_heads, kv);
      }
    });
    return nullptr;
  });
}

Status vision_rope(DType type, void* qkv, const int32_t* row_col, float theta, int64_t p, int64_t heads,
                   int64_t head_dim) {
  const int64_t half = head_dim / 2, quarter = head_dim / 4;
  std::vector<float> inv_freq(static_cast<size_t>(quarter));
  for (int64_t j = 0; j < quarter; ++j) {
    inv_freq[size_t(j)] = float(std::pow(double(theta), -2.0 * double(j) / double(half)));
  }
  return with_type(type, [&](auto t) -> Status {
    using T = decltype(t);
    parallel_slices(p, 16, [&](int64_t begin, int64_t end) {
      std::vector<float> cosines(static_cast<size_t>(half)), sines(static_cast<size_t>(half));
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t d = 0; d < half; ++d) {
          const float angle = float(row_col[r * 2 + d / quarter]) * inv_freq[size_t(d % quarter)];
          cosines[size_t(d)] = std::cos(angle);
          sines[size_t(d)] = std::sin(angle);
        }
        T* q_and_k = (T*)qkv + r * 3 * heads * head_dim;
        for (int64_t h = 0; h < 2 * heads; ++h) {
          rotate_half_split(q_and_k + h * head_dim, cosines.data(), sines.data(), half);
        }
      }
    });
    return nullptr;
  });
}

}  // namespace octet::cpu

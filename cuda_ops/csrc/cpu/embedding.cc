// cpu/embedding.cc   Rows looked up, rows put in place, and pixels made into activations.
//
//   embed_tokens      out[i] = table[ids[i] - vocab_start], zeros outside this rank's rows
//   scatter_rows      out[rows[i]] = source[i]
//   normalize_pixels  out[p, j] = (patch[p, j] / 255 - mean[c]) / std[c], c = j / (features / 3)
//
//   bytes   each row read and written once   -> bandwidth bound
//   map     rows over threads
//   needs   rows contiguous; rows of scatter_rows inside out; any count may be 0
//   order   no sums

#include "../include/embedding.h"

#include "../common/thread_pool.h"

namespace octet::cpu {

Status embed_tokens(DType type, const int32_t* ids, const void* table, int64_t vocab_start, void* out,
                    int64_t m, int64_t vocab_local, int64_t h) {
  const size_t row_bytes = size_t(h) * (type == DType::bfloat16 ? 2 : 4);
  parallel_slices(m, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* row = static_cast<char*>(out) + size_t(i) * row_bytes;
      const int64_t local = ids[i] - vocab_start;
      if (local >= 0 && local < vocab_local) {
        std::memcpy(row, static_cast<const char*>(table) + size_t(local) * row_bytes, row_bytes);
      } else {
        std::memset(row, 0, row_bytes);
      }
    }
  });
  return nullptr;
}

Status scatter_rows(DType type, const void* source, const int32_t* rows, void* out, int64_t r, int64_t m,
                    int64_t h) {
  for (int64_t i = 0; i < r; ++i) {
    if (rows[i] < 0 || rows[i] >= m) return "rows must lie inside out";
  }
  const size_t row_bytes = size_t(h) * (type == DType::bfloat16 ? 2 : 4);
  for (int64_t i = 0; i < r; ++i) {  // in order, so that of two equal targets the last wins
    std::memcpy(static_cast<char*>(out) + size_t(rows[i]) * row_bytes,
                static_cast<const char*>(source) + size_t(i) * row_bytes, row_bytes);
  }
  return nullptr;
}

Status normalize_pixels(const uint8_t* patches, const float* mean, const float* std, DType out_type,
                        void* out, int64_t p, int64_t features) {
  const int64_t plane = features / 3;
  return with_type(out_type, [&](auto t) -> Status {
    using T = decltype(t);
    T table[3][256];  // every value a pixel can take
    for (int c = 0; c < 3; ++c) {
      for (int value = 0; value < 256; ++value) {
        assign(table[c][value], (float(value) / 255.0f - mean[c]) / std[c]);
      }
    }
    parallel_slices(p, 32, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const uint8_t* from = patches + i * features;
        T* to = (T*)out + i * features;
        for (int64_t c = 0; c < 3; ++c) {
          for (int64_t j = c * plane; j < (c + 1) * plane; ++j) to[j] = table[c][from[j]];
        }
      }
    });
    return nullptr;
  });
}

}  // namespace octet::cpu

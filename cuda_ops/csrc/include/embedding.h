// include/embedding.h   Rows looked up, rows put in place, and pixels made into activations.
//
// A CUDA twin is declared beside each function in namespace octet::gpu, with a stream as first argument.

#pragma once

#include "../common/status.h"

namespace octet::cpu {

// out[i] = table[ids[i] - vocab_start], or zeros where that row is not in this shard
Status embed_tokens(DType type, const int32_t* ids, const void* table, int64_t vocab_start, void* out,
                    int64_t m, int64_t vocab_local, int64_t h);

// out[rows[i]] = source[i]   source [R, H], out [M, H]
Status scatter_rows(DType type, const void* source, const int32_t* rows, void* out, int64_t r, int64_t m,
                    int64_t h);

// patches [P, 588] uint8 (channel, y, x) -> out = (patch / 255 - mean[channel]) / std[channel]
Status normalize_pixels(const uint8_t* patches, const float* mean, const float* std, DType out_type,
                        void* out, int64_t p, int64_t features);

}  // namespace octet::cpu

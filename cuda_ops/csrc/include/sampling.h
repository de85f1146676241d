// include/sampling.h   The next token of every row, and its log-probabilities.
//
// A CUDA twin is declared in namespace octet::gpu, with a stream as first argument.

#pragma once

#include "../common/status.h"

namespace octet {

// How each of `num_rows` rows is sampled; see cuda_ops/sampling.py for meaning and order.
struct SamplingBatch {
  int64_t num_rows, vocab;
  const float *temperature, *top_p, *min_p, *repetition, *presence, *frequency;  // [num_rows]
  const int32_t *top_k, *num_prompt_tokens;                                      // [num_rows]
  const int64_t *seeds, *counters;                                               // [num_rows]
  const int32_t *history,
      *history_starts;                    // prompt then output of row r: history[starts[r] .. starts[r + 1])
  const int32_t *banned, *banned_starts;  // likewise
  const int32_t* allowed_bits;            // [ceil(vocab / 32)], shared by all rows
  const int32_t* row_bits;                // [num_rows, ceil(vocab / 32)], of each row; null: no row has any
};

struct SamplingResult {
  int32_t* token_ids;   // [num_rows]; -1 where a row has NaN logits or nothing left to choose
  float* logprobs;      // [num_rows]
  int32_t* top_ids;     // [num_rows, num_top]
  float* top_logprobs;  // [num_rows, num_top]
  int64_t num_top;
};

namespace cpu {

// logits [num_rows, vocab] fp32, overwritten
Status sample_tokens(float* logits, const SamplingBatch& batch, const SamplingResult& result);

}  // namespace cpu
}  // namespace octet

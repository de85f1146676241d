// common/sampling_arguments.h   The arguments of sample_tokens, checked and gathered; for both boundaries.
//
// A boundary says what its body does with them:
//   struct Body {
//     static Status run(const Checks&, float* logits, const SamplingBatch&, const SamplingResult&,
//                       const SamplingSizes&);
//   };

#pragma once

#include <string>

#include "../include/sampling.h"
#include "checks.h"

namespace octet {

// Elements of the lists that the batch points into.
struct SamplingSizes {
  int64_t history, banned;
};

// logits [S, V] fp32, overwritten; the others as in cuda_ops/sampling.py.
template <class Body>
void sample_tokens(TensorView logits, TensorView temperature, TensorView top_k, TensorView top_p,
                   TensorView min_p, TensorView repetition, TensorView presence, TensorView frequency,
                   TensorView seeds, TensorView counters, TensorView history, TensorView history_starts,
                   TensorView num_prompt_tokens, TensorView banned, TensorView banned_starts,
                   TensorView allowed_bits, Optional<TensorView> row_bits, TensorView token_ids,
                   TensorView logprobs, TensorView top_ids, TensorView top_logprobs) {
  Checks check("sample_tokens");
  Dim S("S"), V("V"), history_size("N"), banned_size("B"), n("n");
  check(logits, "logits", {&S, &V}, kFloat32);
  Dim starts("S+1", S + 1), words("V/32 rounded up", (V + 31) / 32);
  check(temperature, "temperature", {&S}, kFloat32)(top_k, "top_k", {&S}, kInt32);
  check(top_p, "top_p", {&S}, kFloat32)(min_p, "min_p", {&S}, kFloat32);
  check(repetition, "repetition", {&S}, kFloat32)(presence, "presence", {&S}, kFloat32);
  check(frequency, "frequency", {&S}, kFloat32)(seeds, "seeds", {&S}, kInt64);
  check(counters, "counters", {&S}, kInt64)(num_prompt_tokens, "num_prompt_tokens", {&S}, kInt32);
  check(history, "history", {&history_size}, kInt32)(history_starts, "history_starts", {&starts}, kInt32);
  check(banned, "banned", {&banned_size}, kInt32)(banned_starts, "banned_starts", {&starts}, kInt32);
  check(allowed_bits, "allowed_bits", {&words}, kInt32);
  if (row_bits.has_value()) check(*row_bits, "row_bits", {&S, &words}, kInt32);
  check(token_ids, "token_ids", {&S}, kInt32)(logprobs, "logprobs", {&S}, kFloat32);
  check(top_ids, "top_ids", {&S, &n}, kInt32)(top_logprobs, "top_logprobs", {&S, &n}, kFloat32);
  check.require(n <= V, "top_ids asks for more tokens than V=" + std::to_string(V.value()));

  SamplingBatch batch{};
  batch.num_rows = S;
  batch.vocab = V;
  batch.temperature = data_of<float>(temperature);
  batch.top_k = data_of<int32_t>(top_k);
  batch.top_p = data_of<float>(top_p);
  batch.min_p = data_of<float>(min_p);
  batch.repetition = data_of<float>(repetition);
  batch.presence = data_of<float>(presence);
  batch.frequency = data_of<float>(frequency);
  batch.seeds = data_of<int64_t>(seeds);
  batch.counters = data_of<int64_t>(counters);
  batch.history = data_of<int32_t>(history);
  batch.history_starts = data_of<int32_t>(history_starts);
  batch.num_prompt_tokens = data_of<int32_t>(num_prompt_tokens);
  batch.banned = data_of<int32_t>(banned);
  batch.banned_starts = data_of<int32_t>(banned_starts);
  batch.allowed_bits = data_of<int32_t>(allowed_bits);
  batch.row_bits = row_bits.has_value() ? data_of<int32_t>(*row_bits) : nullptr;
  const SamplingResult result{data_of<int32_t>(token_ids), data_of<float>(logprobs),
                              data_of<int32_t>(top_ids), data_of<float>(top_logprobs), n};
  check.done(Body::run(check, data_of<float>(logits), batch, result, {history_size, banned_size}));
}

}  // namespace octet

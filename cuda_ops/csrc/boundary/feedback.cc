// boundary/feedback.cc   Exported: feed_tokens.

#include "../include/feedback.h"

#include "../common/checks.h"

namespace octet {
namespace {

void feed_tokens(TensorView sources, TensorView sampled, int64_t vision_from, TensorView token_ids,
                 TensorView token_types) {
  Checks check("feed_tokens");
  Dim M("M"), S("S");
  check(sources, "sources", {&M}, kInt32)(sampled, "sampled", {&S}, kInt32);
  check(token_ids, "token_ids", {&M}, kInt32)(token_types, "token_types", {&M}, kInt32);
  check.done(cpu::feed_tokens(data_of<int32_t>(sources), data_of<int32_t>(sampled), S, vision_from,
                              data_of<int32_t>(token_ids), data_of<int32_t>(token_types), M));
}

OCTET_EXPORT_OP(feed_tokens, feed_tokens)

}  // namespace
}  // namespace octet

// boundary/feedback.cc   Exported: feed_tokens.

#include "../include/feedback.h"

#include "../common/row_arguments.h"

namespace octet {
namespace {

OCTET_EXPORT_OP(feed_tokens, feed_tokens<OnCpu<cpu::feed_tokens>>)

}  // namespace
}  // namespace octet

// boundary/embedding.cc   Exported: embed_tokens, scatter_rows, normalize_pixels.

#include "../include/embedding.h"

#include "../common/row_arguments.h"

namespace octet {
namespace {

OCTET_EXPORT_OP(embed_tokens, embed_tokens<OnCpu<cpu::embed_tokens>>)
OCTET_EXPORT_OP(scatter_rows, scatter_rows<OnCpu<cpu::scatter_rows>>)
OCTET_EXPORT_OP(normalize_pixels, normalize_pixels<OnCpu<cpu::normalize_pixels>>)

}  // namespace
}  // namespace octet

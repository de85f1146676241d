// boundary/norms.cc   Exported: rms_norm, add_rms_norm, layer_norm, silu_mul.

#include "../include/norms.h"

#include "../common/row_arguments.h"

namespace octet {
namespace {

OCTET_EXPORT_OP(rms_norm, rms_norm<OnCpu<cpu::rms_norm>>)
OCTET_EXPORT_OP(add_rms_norm, add_rms_norm<OnCpu<cpu::add_rms_norm>>)
OCTET_EXPORT_OP(layer_norm, layer_norm<OnCpu<cpu::layer_norm>>)
OCTET_EXPORT_OP(silu_mul, silu_mul<OnCpu<cpu::silu_mul>>)

}  // namespace
}  // namespace octet

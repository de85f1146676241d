// boundary/quantize.cc   Exported: quantize_int8, quantize_int4.

#include "../include/quantize.h"

#include "../common/weight_arguments.h"

namespace octet {
namespace {

OCTET_EXPORT_OP(quantize_int8, quantize_int8<OnCpu<cpu::quantize_int8>>)
OCTET_EXPORT_OP(quantize_int4, quantize_int4<OnCpu<cpu::quantize_int4>>)

}  // namespace
}  // namespace octet

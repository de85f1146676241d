// boundary/repeat.cc   Exported: repeat_block.

#include "../include/repeat.h"

#include "../common/weight_arguments.h"

namespace octet {
namespace {

OCTET_EXPORT_OP(repeat_block, repeat_block<OnCpu<cpu::repeat_block>>)

}  // namespace
}  // namespace octet

// boundary/place.cc   What every boundary function of the CPU library begins and ends with.

#include "../common/checks.h"

namespace octet {

Checks::Checks(const char* op) : op_(op) {}

void Checks::done(Status status) const {
  if (status) fail(status);
}

void Checks::require_place(const TensorView& tensor, const char* name) const {
  if (tensor.device().device_type == kDLCPU) return;
  const int type = tensor.device().device_type;
  const std::string device = type == kDLCUDA ? "cuda:" + std::to_string(tensor.device().device_id)
                                             : "device type " + std::to_string(type);
  fail(std::string(name) + " is on " + device + " but the first tensor is on the CPU: move one of them");
}

}  // namespace octet

// include/pack.h   Contract: see cuda_ops/pack.py.

#pragma once

#include "../common/status.h"
#include "weight_view.h"

namespace octet::cpu {

// Reorders data and scales of `count` stacked row-major matrices in place.
Status pack_panels(const WeightView& w, void* data, BF16* scales, int64_t count);

}  // namespace octet::cpu

// emulate/cuda_runtime.h   stands in for CUDA's header of that name when the include path says so
#pragma once
#include "device.hpp"

// emulate/cuda_bf16.h   stands in for CUDA's header of that name when the include path says so
#pragma once
#include "bf16.hpp"

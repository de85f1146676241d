// emulate/memory.hpp   Which global memory a kernel may touch
//
// A caller that registers its buffers gets every access outside of them reported (in libraries built with
// hooks). With nothing registered, global memory is not checked.
#pragma once

#include <cstddef>

namespace emulate {

// Forgets all buffers of this OS thread's launches.
void forget_buffers();
void register_buffer(const void* begin, std::size_t size);

// Whether [address, address + size) lies in one registered buffer, or none is registered.
bool may_touch(const void* address, std::size_t size);

}  // namespace emulate

// gpu/runtime.h   What the boundary asks of the machine; twins: runtime.cu, ../emulate/runtime.cpp
//
// The boundary (../gpu_boundary) is the same code for a GPU and for the emulator. This is all that differs.

#pragma once

#include "../include/norms.h"

namespace octet::gpu {

// Tensors in host memory are the emulator's; a GPU takes its own only.
bool takes_host_tensors();

// Make device `index` the calling thread's. Words if there is no driver, no such device, or it is too old.
Status use_device(int64_t index);

// The emulator lets a call touch only what was lent to it since open_call; a GPU needs neither.
void open_call();
void lend(const void* begin, int64_t bytes);
// More about the latest failed launch, or "".
const char* failure();

// Memory that other processes of this machine can map, zeroed. The handle's bytes may travel anywhere.
struct PeerHandle {
  unsigned char bytes[64];
};
Status create_peer_memory(int64_t bytes, void** base, PeerHandle* handle);
Status open_peer_memory(const PeerHandle& handle, int64_t bytes, void** base);
Status close_peer_memory(void* base, int64_t bytes, bool is_own);

}  // namespace octet::gpu

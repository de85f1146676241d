// gpu/launch.cuh   How a launcher starts a kernel; twin of emulate/launch.cuh
//
// Kernels keep static shared memory in OCTET_SHARED and find the rest with dynamic_shared(), so that the
// emulator knows every byte of it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace octet::gpu {

struct Launch {
  const char* kernel;  // name for reports
  dim3 grid, block;
  size_t shared_bytes;  // dynamic
  void* stream;         // cudaStream_t
};

// Queues the kernel. Null, or what went wrong in words; a failure on the device shows up at the next
// synchronisation.
template <class... Params, class... Args>
const char* launch(const Launch& how, void (*kernel)(Params...), Args... args) {
  if (how.shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(how.shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<how.grid, how.block, how.shared_bytes, static_cast<cudaStream_t>(how.stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline int num_multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

inline const char* fill_bytes(void* to, int value, size_t size, void* stream) {
  const cudaError_t error = cudaMemsetAsync(to, value, size, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

}  // namespace octet::gpu

#define OCTET_SHARED(T, name, size) __shared__ T name[size]

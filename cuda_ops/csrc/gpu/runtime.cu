// gpu/runtime.cu   Devices and memory shared between processes, by the CUDA runtime

#include <cuda_runtime.h>

#include <cstring>
#include <string>

#include "runtime.h"

namespace octet::gpu {
namespace {

constexpr int kOldestMajor = 8;  // sm_80: mma.sync on bf16, cp.async

Status words(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

bool takes_host_tensors() {
  return false;
}

Status use_device(int64_t index) {
  static thread_local std::string wrong;
  int count = 0, major = 0, minor = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found == cudaErrorInsufficientDriver)
    return "the GPU's driver is missing or older than the CUDA toolkit that built cuda_ops: update the "
           "driver";
  if (found == cudaErrorNoDevice || (found == cudaSuccess && count == 0))
    return "there is no GPU that CUDA can use on this machine (nvidia-smi and CUDA_VISIBLE_DEVICES show why)";
  if (found != cudaSuccess) return words(found);
  if (index < 0 || index >= count) {
    wrong = "there is no GPU " + std::to_string(index) + ": this machine shows " + std::to_string(count);
    return wrong.c_str();
  }
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, int(index));
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, int(index));
  if (major < kOldestMajor) {
    wrong = "GPU " + std::to_string(index) + " is of compute capability " + std::to_string(major) + "." +
            std::to_string(minor) + "; the kernels need 8.0 (A100) or newer";
    return wrong.c_str();
  }
  return words(cudaSetDevice(int(index)));
}

void open_call() {}
void lend(const void*, int64_t) {}
const char* failure() {
  return "";
}

Status create_peer_memory(int64_t bytes, void** base, PeerHandle* handle) {
  static_assert(sizeof(cudaIpcMemHandle_t) <= sizeof(PeerHandle));
  if (Status wrong = words(cudaMalloc(base, size_t(bytes)))) return wrong;
  if (Status wrong = words(cudaMemset(*base, 0, size_t(bytes)))) return wrong;
  if (Status wrong = words(cudaDeviceSynchronize())) return wrong;
  cudaIpcMemHandle_t ipc;
  if (Status wrong = words(cudaIpcGetMemHandle(&ipc, *base))) return wrong;
  std::memcpy(handle->bytes, &ipc, sizeof(ipc));
  return nullptr;
}

Status open_peer_memory(const PeerHandle& handle, int64_t, void** base) {
  cudaIpcMemHandle_t ipc;
  std::memcpy(&ipc, handle.bytes, sizeof(ipc));
  return words(cudaIpcOpenMemHandle(base, ipc, cudaIpcMemLazyEnablePeerAccess));
}

Status close_peer_memory(void* base, int64_t, bool is_own) {
  return words(is_own ? cudaFree(base) : cudaIpcCloseMemHandle(base));
}

}  // namespace octet::gpu

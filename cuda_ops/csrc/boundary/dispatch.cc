// boundary/dispatch.cc   Calls for tensors on a GPU, handed on. Exported: set_device_library, emulate_device.

#include "../common/dispatch.h"

#include <mutex>
#include <unordered_map>

#include "../common/checks.h"

namespace octet {
namespace {

using ffi::Function;

// How the device library is reached: `find` returns its function of that name, loading it first if need be.
struct DeviceLibrary {
  std::mutex mutex;
  Optional<Function> find;
  std::unordered_map<std::string, Function> found;
  bool takes_host_tensors = false;  // the emulator's device: its memory is the host's

  Function operator()(const std::string& name) {
    std::lock_guard lock(mutex);
    const auto known = found.find(name);
    if (known != found.end()) return known->second;
    if (!find.has_value()) TVM_FFI_THROW(RuntimeError) << name << ": no device library was set";
    return found.emplace(name, find.value()(name).cast<Function>()).first->second;
  }
};

DeviceLibrary& device_library() {
  // Never destroyed: it holds a Python function, and Python has ended when static objects go.
  static DeviceLibrary& library = *new DeviceLibrary;
  return library;
}

const DLTensor* tensor_of(const TVMFFIAny& argument) {
  if (argument.type_index == kTVMFFIDLTensorPtr) return static_cast<const DLTensor*>(argument.v_ptr);
  if (argument.type_index == kTVMFFITensor) return TVMFFITensorGetDLTensorPtr(argument.v_obj);
  return nullptr;
}

void set_device_library(Function find) {
  DeviceLibrary& library = device_library();
  std::lock_guard lock(library.mutex);
  library.find = find;
  library.found.clear();
}

// While on, tensors in host memory are the device's: every op runs in the device library.
void emulate_device(bool is_on) {
  device_library().takes_host_tensors = is_on;
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_device_library, set_device_library);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(emulate_device, emulate_device);

}  // namespace

bool is_for_device(const TVMFFIAny* args, int32_t num_args) {
  for (int32_t i = 0; i < num_args; ++i) {
    const DLTensor* tensor = tensor_of(args[i]);
    if (!tensor) continue;
    return tensor->device.device_type == kDLCUDA || device_library().takes_host_tensors;
  }
  return false;
}

void call_on_device(const char* name, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) {
  device_library()(name).CallPacked(reinterpret_cast<const ffi::AnyView*>(args), num_args,
                                    reinterpret_cast<ffi::Any*>(result));
}

}  // namespace octet

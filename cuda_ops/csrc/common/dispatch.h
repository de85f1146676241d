// common/dispatch.h   An op is exported once: where its first tensor lives decides whose body runs
//
//   OCTET_EXPORT_OP(rms_norm, rms_norm)
//
// exports the CPU boundary function and hands the call on, arguments untouched, to the function of the same
// name in the device library (csrc/gpu_boundary) when the first tensor argument is on a GPU. That library is
// asked for when the first such call comes (boundary/dispatch.cc), so machines without a GPU never build it.

#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <string>
#include <utility>

namespace octet {

// Whether the first tensor among the arguments belongs to the device library.
bool is_for_device(const TVMFFIAny* args, int32_t num_args);
void call_on_device(const char* name, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result);

template <class Function>
void call_here(const char* name, Function function, const TVMFFIAny* args, int32_t num_args,
               TVMFFIAny* result) {
  using Info = tvm::ffi::detail::FunctionInfo<std::decay_t<Function>>;
  const std::string named = name;
  tvm::ffi::detail::unpack_call<typename Info::RetType>(
      std::make_index_sequence<Info::num_args>{}, &named, function,
      reinterpret_cast<const tvm::ffi::AnyView*>(args), num_args, reinterpret_cast<tvm::ffi::Any*>(result));
}

}  // namespace octet

#define OCTET_EXPORT_OP(name, function)                                                              \
  extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_##name(void*, const TVMFFIAny* args, int32_t num_args, \
                                                     TVMFFIAny* result) {                            \
    TVM_FFI_SAFE_CALL_BEGIN();                                                                       \
    if (octet::is_for_device(args, num_args)) {                                                      \
      octet::call_on_device(#name, args, num_args, result);                                          \
    } else {                                                                                         \
      octet::call_here(#name, function, args, num_args, result);                                     \
    }                                                                                                \
    TVM_FFI_SAFE_CALL_END();                                                                         \
  }

// boundary/recording.cc   Exported: make_recording. Calls that are made again and again, as one.
//
// Beside an op that waits for memory the caches keep nothing: what is between two calls of a step costs more
// in an interpreter, whose own code and objects have to come from memory, than here.

#include <tvm/ffi/tvm_ffi.h>

#include <vector>

namespace octet {
namespace {

namespace ffi = tvm::ffi;
using ffi::Any, ffi::AnyView, ffi::Array, ffi::Function;

struct Call {
  Array<Any> kept;  // function and arguments
  Function function;
  std::vector<AnyView> arguments;  // as a call takes them

  explicit Call(const Array<Any>& call) : kept(call), function(call[0].cast<Function>()) {
    arguments.assign(call.begin() + 1, call.end());
  }
};

// A function without arguments that makes the calls [function, argument, ...] in order; an error ends it.
Function make_recording(const Array<Array<Any>>& given) {
  const std::vector<Call> calls(given.begin(), given.end());
  return Function::FromTyped([calls] {
    for (const Call& call : calls) {
      Any result;
      call.function.CallPacked(call.arguments.data(), int32_t(call.arguments.size()), &result);
    }
  });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_recording, make_recording);

}  // namespace
}  // namespace octet

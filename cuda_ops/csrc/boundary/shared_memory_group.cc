// boundary/shared_memory_group.cc   Exported: group_open, group_all_reduce, group_all_gather,
// group_broadcast, group_barrier, group_abort, group_close.
//
// A group is a number on the Python side. It stays alive while a call uses it, even if another thread
// closes it meanwhile.

#include "../include/shared_memory_group.h"

#include <map>
#include <memory>
#include <mutex>

#include "../common/checks.h"

namespace octet {
namespace {

using cpu::SharedMemoryGroup;

struct Registry {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<SharedMemoryGroup>> groups;
  int64_t next = 1;
};

Registry& registry() {
  static Registry* const instance = new Registry;
  return *instance;
}

std::shared_ptr<SharedMemoryGroup> find(int64_t handle) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  const auto found = registry().groups.find(handle);
  if (found == registry().groups.end()) TVM_FFI_THROW(ValueError) << "SharedMemoryGroup: the group is closed";
  return found->second;
}

// Runs `call`, turning a rank's failure into a RuntimeError that names the op.
template <class Body>
void guarded(const char* op, Body call) {
  try {
    call();
  } catch (const cpu::GroupError& error) {
    TVM_FFI_THROW(RuntimeError) << "SharedMemoryGroup." << op << ": " << error.what();
  }
}

int64_t group_open(ffi::String path, int64_t rank, int64_t world_size, double timeout) {
  std::shared_ptr<SharedMemoryGroup> group;
  guarded("open", [&] { group = cpu::open_group(std::string(path), int(rank), int(world_size), timeout); });
  std::lock_guard<std::mutex> lock(registry().mutex);
  registry().groups[registry().next] = group;
  return registry().next++;
}

int64_t num_bytes(const TensorView& tensor) {
  return tensor.numel() * tensor.dtype().bits / 8;
}

void require_plain(const Checks& check, const TensorView& tensor, const char* name) {
  check.require(tensor.device().device_type == kDLCPU && tensor.IsContiguous(),
                std::string(name) + " must be contiguous and on the CPU");
}

void group_all_reduce(int64_t handle, TensorView x) {
  Checks check("SharedMemoryGroup.all_reduce");
  Dim size("size");
  check.flat(x, "x", size, kActivation);
  guarded("all_reduce", [&] { find(handle)->all_reduce(dtype_of(x), data_of(x), size); });
}

void group_all_gather(int64_t handle, TensorView x, TensorView out) {
  Checks check("SharedMemoryGroup.all_gather");
  const auto group = find(handle);
  require_plain(check, x, "x");
  require_plain(check, out, "out");
  check.require(num_bytes(out) == group->world_size() * num_bytes(x) && out.ndim() > 0 &&
                    out.size(0) == group->world_size(),
                "out must be [world_size, x's shape] of x's type");
  guarded("all_gather", [&] { group->all_gather(data_of(x), num_bytes(x), data_of(out)); });
}

void group_broadcast(int64_t handle, TensorView x, int64_t root) {
  Checks check("SharedMemoryGroup.broadcast");
  const auto group = find(handle);
  require_plain(check, x, "x");
  check.require(root >= 0 && root < group->world_size(), "root must lie in [0, world_size)");
  guarded("broadcast", [&] { group->broadcast(data_of(x), num_bytes(x), root); });
}

void group_barrier(int64_t handle) {
  guarded("barrier", [&] { find(handle)->barrier(); });
}

void group_abort(int64_t handle) {
  find(handle)->abort();
}

void group_close(int64_t handle) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  registry().groups.erase(handle);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_open, group_open);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_all_reduce, group_all_reduce);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_all_gather, group_all_gather);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_broadcast, group_broadcast);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_barrier, group_barrier);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_abort, group_abort);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group_close, group_close);

}  // namespace
}  // namespace octet

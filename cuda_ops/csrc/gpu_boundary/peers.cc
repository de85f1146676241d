// gpu_boundary/peers.cc   Exported: the all-reduce between the GPUs of a machine, through memory they map.
//
// A group is made in two steps, because the handles travel by other means in between (peer_group.py):
// peers_create makes this rank's region, peers_open maps the others'.

#include <array>
#include <map>
#include <memory>
#include <mutex>

#include "device.h"

namespace octet {
namespace {

struct Peers {
  gpu::PeerGroup group{};
  int64_t bytes = 0;

  ~Peers() {
    for (int rank = 0; rank < group.world_size; ++rank) {
      if (group.regions[rank]) gpu::close_peer_memory(group.regions[rank], bytes, rank == group.rank);
    }
  }
};

std::mutex mutex;
std::map<int64_t, std::shared_ptr<Peers>> groups;

std::shared_ptr<Peers> group_of(const Checks& check, int64_t handle) {
  std::lock_guard lock(mutex);
  const auto found = groups.find(handle);
  if (found == groups.end()) check.fail("the group is closed");
  return found->second;
}

// own [64] uint8, in host memory: where this rank's handle is written
int64_t peers_create(int64_t rank, int64_t world_size, int64_t capacity, int64_t own) {
  Checks check("peers_create");
  check.require(
      world_size >= 2 && world_size <= 8 && rank >= 0 && rank < world_size,
      "a group has 2 to 8 ranks, got rank " + std::to_string(rank) + " of " + std::to_string(world_size));
  auto peers = std::make_shared<Peers>();
  peers->group.rank = int32_t(rank);
  peers->group.world_size = int32_t(world_size);
  peers->group.capacity = capacity;
  peers->bytes = gpu::peer_region_bytes(capacity);
  check.done(gpu::create_peer_memory(peers->bytes, &peers->group.regions[rank],
                                     reinterpret_cast<gpu::PeerHandle*>(own)));
  static int64_t next = 1;
  std::lock_guard lock(mutex);
  groups[next] = peers;
  return next++;
}

// handles [world_size, 64] uint8, in host memory
void peers_open(int64_t handle, int64_t handles) {
  Checks check("peers_open");
  const auto peers = group_of(check, handle);
  const auto* all = reinterpret_cast<const gpu::PeerHandle*>(handles);
  for (int rank = 0; rank < peers->group.world_size; ++rank) {
    if (rank == peers->group.rank) continue;
    check.done(gpu::open_peer_memory(all[rank], peers->bytes, &peers->group.regions[rank]));
  }
}

void peers_close(int64_t handle) {
  std::lock_guard lock(mutex);
  groups.erase(handle);
}

void lend_regions(const Peers& peers) {
  for (int rank = 0; rank < peers.group.world_size; ++rank) gpu::lend(peers.group.regions[rank], peers.bytes);
}

void all_reduce(int64_t handle, TensorView x, TensorView out) {
  Checks check("all_reduce");
  const auto peers = group_of(check, handle);
  Dim size("size");
  check.flat(x, "x", size, kBFloat16);
  check.flat(out, "out", size, kBFloat16);
  lend_regions(*peers);
  check.done(gpu::all_reduce(current_stream(), peers->group, data_of(x), data_of(out), size));
}

void all_reduce_add_rms_norm(int64_t handle, TensorView x, TensorView residual, TensorView weight, double eps,
                             TensorView out) {
  Checks check("all_reduce_add_rms_norm");
  const auto peers = group_of(check, handle);
  Dim M("M"), H("H");
  check(x, "x", {&M, &H}, kBFloat16)(residual, "residual", {&M, &H}, kBFloat16);
  check(weight, "weight", {&H}, kBFloat16)(out, "out", {&M, &H}, kBFloat16);
  lend_regions(*peers);
  check.done(gpu::all_reduce_add_rms_norm(current_stream(), peers->group, data_of(x), data_of(residual),
                                          data_of(weight), float(eps), data_of(out), M, H));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(peers_create, peers_create);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(peers_open, peers_open);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(peers_close, peers_close);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(peers_all_reduce, all_reduce);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(peers_all_reduce_add_rms_norm, all_reduce_add_rms_norm);

}  // namespace
}  // namespace octet

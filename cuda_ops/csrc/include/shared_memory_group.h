// include/shared_memory_group.h   Collectives between the ranks of one machine, through a shared mapping.

#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "../common/status.h"

namespace octet::cpu {

// A rank did not come in time, gave up, or called something else; the message names it.
struct GroupError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One rank's end. Every rank makes the same calls in the same order; calls block until all have joined.
class SharedMemoryGroup {
 public:
  virtual ~SharedMemoryGroup() = default;

  virtual void all_reduce(DType type, void* x, int64_t size) = 0;        // x [size] = sum over ranks
  virtual void all_gather(const void* x, int64_t bytes, void* out) = 0;  // out [world, bytes]
  virtual void broadcast(void* x, int64_t bytes, int64_t root) = 0;      // x of root everywhere
  virtual void barrier() = 0;
  virtual void abort() = 0;  // wakes every waiting rank with an error; callable from any thread
  virtual int64_t world_size() const = 0;
};

// Maps `path` (made by the first rank that comes), waits for all ranks, then unlinks it.
std::unique_ptr<SharedMemoryGroup> open_group(const std::string& path, int rank, int world_size,
                                              double timeout);

}  // namespace octet::cpu

// emulate/shared_memory.hpp   The shared memory of one block, and what is known about each of its bytes
//
// Every access of a kernel compiled with hooks (hooks.cpp) and every warp operation that touches shared
// memory passes through `read` and `write`, which find
//   - reads of bytes nobody has written: a block starts with all of them unwritten and filled with NaN
//   - reads and writes of bytes that a cp.async still has in flight
//   - two threads at the same bytes, one of them writing, with no barrier between them
// Accesses are seen in units of two bytes, the smallest type kernels keep in shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "fiber.hpp"

namespace emulate {

// When an access happened, counted in barriers: __syncthreads orders a whole block, __syncwarp one warp.
struct When {
  std::uint32_t thread;       // index in the block
  std::uint32_t block_epoch;  // block barriers passed
  std::uint32_t warp_epoch;   // full-warp barriers passed by the thread's warp
};

class SharedMemory {
 public:
  SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory();

  // A fresh block: `dynamic_bytes` as asked for by the launch, statics follow as they are met.
  void reset(std::size_t dynamic_bytes);

  EMULATE_PLAIN char* dynamic() { return bytes_; }

  // The place of one static variable, the same for every thread of the block. `tag` names the variable.
  void* fixed(const void* tag, std::size_t size);

  bool contains(const void* address) const {
    const char* place = static_cast<const char*>(address);
    return place >= bytes_ && place < bytes_ + size_;
  }

  // Null, or what is wrong with the access in words.
  const char* read(const void* address, std::size_t size, const When& now);
  const char* write(const void* address, std::size_t size, const When& now);
  const char* start_copy(const void* address, std::size_t size, const When& now);   // cp.async issued
  const char* finish_copy(const void* address, std::size_t size, const When& now);  // and waited for
  const char* atomic(const void* address, std::size_t size, const When& now);

  std::size_t offset(const void* address) const { return static_cast<const char*>(address) - bytes_; }

 private:
  enum class State : std::uint8_t { unwritten, written, in_flight };

  // One unit of two bytes. A reader is a thread, or one of the two marks for several readers.
  struct Cell {
    When writer{kNobody, 0, 0};
    When reader{kNobody, 0, 0};
    State state = State::unwritten;
  };
  static constexpr std::uint32_t kNobody = 0xffffffffu;
  static constexpr std::uint32_t kSeveralLanes = 0x80000000u;  // | warp
  static constexpr std::uint32_t kSeveralWarps = 0x40000000u;

  static bool unordered(const When& earlier, const When& now);
  static void add_reader(Cell& cell, const When& now);
  bool fits(const void* address, std::size_t size) const;
  Cell* first_cell(const void* address) { return &cells_[offset(address) / 2]; }
  static std::size_t num_cells(std::size_t offset, std::size_t size) {
    return (offset + size + 1) / 2 - offset / 2;
  }

  static constexpr std::size_t kMaxBytes = 256 * 1024;  // more than any device has

  struct Fixed {
    const void* tag;
    std::size_t offset;
  };

  void grow(std::size_t size);

  char* bytes_;  // kMaxBytes, of which [0, size_) exist in this block
  std::size_t size_ = 0;
  std::vector<Cell> cells_;  // one per two bytes of [0, size_)
  std::vector<Fixed> fixed_;
};

}  // namespace emulate

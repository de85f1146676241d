// emulate/block.hpp   One CUDA block: its threads as fibers, and the points where they meet
//
// A thread runs until it has to wait for others: at a block barrier, or at a warp operation. The last one to
// arrive does the work for all of them and lets them go on, in thread order. So a run is deterministic, and
// when nobody can go on the block knows who waits for what.
//
//   device.hpp  what a kernel's source sees (threadIdx, __syncthreads, ...)      launch.cpp  runs the grid
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "fiber.hpp"
#include "profile.hpp"
#include "shared_memory.hpp"

namespace emulate {

struct Index3 {
  unsigned x = 1, y = 1, z = 1;
};

// What a launch asked for.
struct Grid {
  std::string kernel;  // name for reports
  Index3 grid, block;
  std::size_t shared_bytes = 0;
};

// What every thread runs: the kernel with its arguments, which live in the launcher's frame.
struct Body {
  void (*call)(const void* arguments);
  const void* arguments;
  std::size_t size;
};

class Block;

// One lane's part in a warp operation: what it brings and where its result goes.
struct LaneCall {
  void (*complete)(LaneCall* const lanes[32], std::uint32_t mask);  // also identifies the operation
  const char* name;
  std::uint32_t mask;
  const void* in;
  void* out;
};

struct Copy {  // one cp.async
  void* to;
  const void* from;
  unsigned size, valid;  // bytes; the rest up to `size` becomes zero
};

struct Thread {
  enum class State { ready, at_barrier, in_warp_call, done };

  Block* block = nullptr;
  Index3 index;
  unsigned linear = 0;  // index in the block
  State state = State::ready;
  const char* file = "";  // where it waits
  int line = 0;
  int barrier_value = 0;  // what it brings to __syncthreads_or and its kin; then the result
  LaneCall* call = nullptr;
  std::vector<Copy> open_copies;              // issued, not yet committed
  std::deque<std::vector<Copy>> copy_groups;  // committed, oldest first
  std::chrono::steady_clock::time_point spinning_since{};
  std::vector<Access> accesses;  // since its warp last met, when profiling
  Fiber fiber;
};

class Block {
 public:
  // Runs block `index` to its end. Empty, or the report of what went wrong.
  std::string run(const Grid& grid, Index3 index, const Body& body);

  EMULATE_PLAIN const Grid& grid() const { return *grid_; }
  EMULATE_PLAIN Index3 index() const { return index_; }
  const Body& body() const { return *body_; }
  EMULATE_PLAIN SharedMemory& shared() { return shared_; }

  // Called on a fiber, by the functions of device.hpp.
  int barrier(Thread& self, int value, int (*combine)(int, int), const char* file, int line);
  void warp_call(Thread& self, LaneCall& call);
  void yield(Thread& self);
  [[noreturn]] void fail(Thread& self, const std::string& what);
  void check_shared(Thread& self, const char* (SharedMemory::*access)(const void*, std::size_t, const When&),
                    const void* address, std::size_t size);
  void copy_async(Thread& self, const Copy& copy, const void* instruction);
  void note(Thread& self, const void* instruction, const void* address, std::size_t size);
  void commit_copies(Thread& self);
  void wait_copies(Thread& self, std::size_t may_remain);

 private:
  static void enter(void* thread);
  void prepare(const Grid& grid, Index3 index, const Body& body);
  void leave(Thread& self, Thread::State state);
  bool is_stuck_with(const Thread& self, unsigned lane) const;
  void release_barrier(int (*combine)(int, int));
  When now(const Thread& self) const;
  std::string place(const Thread& thread) const;
  std::string deadlock() const;
  void profile_warp(unsigned warp);

  const Grid* grid_ = nullptr;
  const Body* body_ = nullptr;
  Index3 index_;
  SharedMemory shared_;
  std::deque<Thread> threads_;  // never shrinks: stacks are reused by the next block
  unsigned num_threads_ = 0;
  std::deque<Thread*> ready_;
  unsigned num_at_barrier_ = 0, num_done_ = 0;
  std::uint32_t block_epoch_ = 0;
  std::vector<std::uint32_t> warp_epochs_;
  std::string report_;
  Profile profile_;
  Fiber scheduler_;
};

// The running thread of this OS thread; null outside kernels.
Thread* running();

}  // namespace emulate

// emulate/block.cpp   see block.hpp
#include "block.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace emulate {
namespace {

thread_local Thread* running_thread = nullptr;

constexpr auto kLongestSpin = std::chrono::seconds(20);

std::string text(const Index3& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

}  // namespace

Thread* running() {
  return running_thread;
}

std::string Block::run(const Grid& grid, Index3 index, const Body& body) {
  prepare(grid, index, body);
  while (!ready_.empty() && report_.empty()) {
    Thread* next = ready_.front();
    ready_.pop_front();
    running_thread = next;
    next->fiber.switch_from(scheduler_);
    running_thread = nullptr;
  }
  if (report_.empty() && num_done_ < num_threads_) report_ = deadlock();
  if (Profile::is_on()) {
    for (unsigned warp = 0; warp * 32 < num_threads_; ++warp) profile_warp(warp);
    profile_.publish(grid.kernel);
  }
  return report_;
}

void Block::prepare(const Grid& grid, Index3 index, const Body& body) {
  grid_ = &grid;
  index_ = index;
  body_ = &body;
  report_.clear();
  ready_.clear();
  num_at_barrier_ = num_done_ = 0;
  block_epoch_ = 0;
  shared_.reset(grid.shared_bytes);
  num_threads_ = grid.block.x * grid.block.y * grid.block.z;
  warp_epochs_.assign((num_threads_ + 31) / 32, 0);
  while (threads_.size() < num_threads_) threads_.emplace_back();
  for (unsigned i = 0; i < num_threads_; ++i) {
    Thread& thread = threads_[i];
    thread.block = this;
    thread.linear = i;
    thread.index = {i % grid.block.x, i / grid.block.x % grid.block.y, i / (grid.block.x * grid.block.y)};
    thread.state = Thread::State::ready;
    thread.call = nullptr;
    thread.open_copies.clear();
    thread.copy_groups.clear();
    thread.spinning_since = {};
    thread.accesses.clear();
    thread.fiber.reset(&Block::enter, &thread);
    ready_.push_back(&thread);
  }
}

void Block::enter(void* argument) {
  Thread& self = *static_cast<Thread*>(argument);
  self.fiber.arrived();
  Block& block = *self.block;
  block.body_->call(block.body_->arguments);
  if (!self.open_copies.empty())
    block.fail(self, "leaves the kernel with a cp.async that was never committed");
  for (const auto& group : self.copy_groups) {
    if (!group.empty()) block.fail(self, "leaves the kernel with a cp.async that was never waited for");
  }
  ++block.num_done_;
  block.leave(self, Thread::State::done);
}

void Block::leave(Thread& self, Thread::State state) {
  self.state = state;
  const bool is_last_time = state == Thread::State::done || !report_.empty();
  scheduler_.switch_from(self.fiber, is_last_time);
}

When Block::now(const Thread& self) const {
  return {self.linear, block_epoch_, warp_epochs_[self.linear / 32]};
}

int Block::barrier(Thread& self, int value, int (*combine)(int, int), const char* file, int line) {
  self.barrier_value = value;
  self.file = file;
  self.line = line;
  self.spinning_since = {};
  ++num_at_barrier_;
  if (num_at_barrier_ < num_threads_) {
    leave(self, Thread::State::at_barrier);
    return self.barrier_value;
  }
  for (unsigned i = 0; i < num_threads_; ++i) {
    const Thread& other = threads_[i];
    if (other.line != line || std::strcmp(other.file, file) != 0) {
      fail(self, "barrier divergence: waits at " + std::string(base_name(file)) + ":" + std::to_string(line) +
                     " while thread " + text(other.index) + " waits at " + base_name(other.file) + ":" +
                     std::to_string(other.line));
    }
  }
  release_barrier(combine);
  return self.barrier_value;
}

void Block::release_barrier(int (*combine)(int, int)) {
  int result = threads_[0].barrier_value;
  for (unsigned i = 1; i < num_threads_; ++i) result = combine(result, threads_[i].barrier_value);
  num_at_barrier_ = 0;
  ++block_epoch_;
  for (unsigned warp = 0; Profile::is_on() && warp * 32 < num_threads_; ++warp) profile_warp(warp);
  for (unsigned i = 0; i < num_threads_; ++i) {
    threads_[i].barrier_value = result;
    if (threads_[i].state != Thread::State::at_barrier) continue;
    threads_[i].state = Thread::State::ready;
    ready_.push_back(&threads_[i]);
  }
}

void Block::warp_call(Thread& self, LaneCall& call) {
  const unsigned lane = self.linear % 32, first = self.linear - lane;
  const unsigned lanes_here = std::min(32u, num_threads_ - first);
  const std::uint32_t existing = lanes_here == 32 ? 0xffffffffu : (1u << lanes_here) - 1;
  if (!(call.mask >> lane & 1))
    fail(self, std::string(call.name) + " with a mask that leaves out the caller");
  call.mask &= existing;
  self.call = &call;
  LaneCall* lanes[32] = {};
  for (unsigned i = 0; i < lanes_here; ++i) {
    if (!(call.mask >> i & 1)) continue;
    const LaneCall* other = threads_[first + i].call;
    if (is_stuck_with(self, first + i)) {
      fail(self, "warp divergence: is at " + std::string(call.name) + " while thread " +
                     text(threads_[first + i].index) + " is at " + other->name);
    }
    if (other == nullptr || other->complete != call.complete || other->mask != call.mask) {
      leave(self, Thread::State::in_warp_call);  // the last lane to come finds everybody here
      return;
    }
    lanes[i] = threads_[first + i].call;
  }
  call.complete(lanes, call.mask);
  if (Profile::is_on() && call.mask == existing) profile_warp(self.linear / 32);
  if (std::strcmp(call.name, "__syncwarp") == 0 && call.mask == existing) ++warp_epochs_[self.linear / 32];
  for (unsigned i = 0; i < lanes_here; ++i) {
    if (lanes[i] == nullptr) continue;
    Thread& other = threads_[first + i];
    other.call = nullptr;
    if (other.state != Thread::State::in_warp_call) continue;
    other.state = Thread::State::ready;
    ready_.push_back(&other);
  }
}

// Lane `other` waits in another operation that needs `self` too, so neither can ever go on.
bool Block::is_stuck_with(const Thread& self, unsigned other) const {
  const LaneCall* theirs = threads_[other].call;
  if (theirs == nullptr || (theirs->complete == self.call->complete && theirs->mask == self.call->mask))
    return false;
  return theirs->mask >> (self.linear % 32) & 1;
}

void Block::yield(Thread& self) {
  const auto now = std::chrono::steady_clock::now();
  if (self.spinning_since == std::chrono::steady_clock::time_point{}) self.spinning_since = now;
  if (now - self.spinning_since > kLongestSpin) fail(self, "has been waiting for a flag for 20 s");
  if (ready_.empty()) std::this_thread::yield();
  ready_.push_back(&self);
  leave(self, Thread::State::ready);
}

void Block::fail(Thread& self, const std::string& what) {
  if (report_.empty()) report_ = place(self) + " " + what;
  ready_.clear();
  leave(self, Thread::State::done);
  std::abort();  // never entered again
}

std::string Block::place(const Thread& thread) const {
  return "kernel " + grid_->kernel + ", block " + text(index_) + ", thread " + text(thread.index) + ":";
}

std::string Block::deadlock() const {
  std::string waiting, left;
  unsigned num_waiting = 0;
  for (unsigned i = 0; i < num_threads_; ++i) {
    const Thread& thread = threads_[i];
    if (thread.state == Thread::State::done) {
      if (left.empty()) left = text(thread.index);
    } else if (num_waiting++ == 0) {
      waiting = place(thread) + (thread.state == Thread::State::at_barrier
                                     ? " waits at the barrier of " + std::string(base_name(thread.file)) +
                                           ":" + std::to_string(thread.line)
                                     : " waits in " + std::string(thread.call->name));
    }
  }
  return waiting + " for ever" + (left.empty() ? "" : ", thread " + left + " has left the kernel") + " (" +
         std::to_string(num_waiting) + " threads wait, " + std::to_string(num_done_) + " have left)";
}

// Without hooks nobody tells the books about ordinary stores, so only the bounds can be checked.
#if defined(OCTET_EMULATE_HOOKS)
constexpr bool kHasHooks = true;
#else
constexpr bool kHasHooks = false;
#endif

void Block::check_shared(Thread& self,
                         const char* (SharedMemory::*access)(const void*, std::size_t, const When&),
                         const void* address, std::size_t size) {
  if (!shared_.contains(address)) fail(self, "uses an address that is not in its shared memory");
  if (!kHasHooks) return;
  if (const char* wrong = (shared_.*access)(address, size, now(self))) {
    fail(self, std::string(wrong) + " (" + std::to_string(size) + " bytes at offset " +
                   std::to_string(shared_.offset(address)) + ")");
  }
}

void Block::note(Thread& self, const void* instruction, const void* address, std::size_t size) {
  if (!Profile::is_on()) return;
  const bool is_shared = shared_.contains(address);
  const auto place = is_shared ? shared_.offset(address) : reinterpret_cast<std::uintptr_t>(address);
  self.accesses.push_back({instruction, place, std::uint32_t(size), is_shared});
}

void Block::profile_warp(unsigned warp) {
  std::vector<Access>* lanes[32] = {};
  for (unsigned lane = 0; lane < 32 && warp * 32 + lane < num_threads_; ++lane) {
    lanes[lane] = &threads_[warp * 32 + lane].accesses;
  }
  profile_.add_warp(lanes);
}

void Block::copy_async(Thread& self, const Copy& copy, const void* instruction) {
  note(self, instruction, copy.to, copy.size);
  if (copy.valid) note(self, instruction, copy.from, copy.valid);
  check_shared(self, &SharedMemory::start_copy, copy.to, copy.size);
  if (reinterpret_cast<std::uintptr_t>(copy.to) % copy.size != 0)
    fail(self, "cp.async to an unaligned address");
  if (copy.valid && reinterpret_cast<std::uintptr_t>(copy.from) % copy.size != 0) {
    fail(self, "cp.async from an unaligned address");
  }
  self.open_copies.push_back(copy);
}

void Block::commit_copies(Thread& self) {
  self.copy_groups.push_back(std::move(self.open_copies));
  self.open_copies.clear();
}

void Block::wait_copies(Thread& self, std::size_t may_remain) {
  while (self.copy_groups.size() > may_remain) {
    for (const Copy& copy : self.copy_groups.front()) {
      std::memset(copy.to, 0, copy.size);
      std::memcpy(copy.to, copy.from, copy.valid);
      check_shared(self, &SharedMemory::finish_copy, copy.to, copy.size);
    }
    self.copy_groups.pop_front();
  }
}

}  // namespace emulate

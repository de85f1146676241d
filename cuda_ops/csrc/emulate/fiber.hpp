// emulate/fiber.hpp   one CUDA thread = one fiber: a stack of its own and a switch that costs nanoseconds
//
// What runs on the fibers, and in which order, is decided in block.cpp.
#pragma once

#include <cstddef>

// A function of the machine itself: the hooks do not watch its memory accesses (see hooks.cpp).
#define EMULATE_PLAIN __attribute__((no_sanitize_thread))

namespace emulate {

// A stack that can be left and entered again. The fiber runs `entry(argument)`, which must not return:
// it leaves for the last time with switch_to.
class Fiber {
 public:
  Fiber() = default;  // the calling OS thread itself
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Makes the stack once, then prepares it to run `entry(argument)` from the start. What an earlier run
  // left on the stack is forgotten.
  void reset(void (*entry)(void*), void* argument);

  // Leaves the running fiber `from` and continues in this one. `from_is_done` tells the sanitizer that
  // `from` is never entered again before a reset.
  void switch_from(Fiber& from, bool from_is_done = false);

  // To be called first in `entry`.
  void arrived();

  const char* stack_begin() const { return stack_; }
  const char* stack_end() const { return stack_ + size_; }

 private:
  char* stack_ = nullptr;  // owned, except for an OS thread's own stack
  std::size_t size_ = 0;   // bytes, a multiple of the page size
  bool owns_stack_ = false;
  void* stack_pointer_ = nullptr;  // where a switch continues
  void* context_ = nullptr;        // ucontext_t, where there is no hand-written switch
  void* sanitizer_stack_ = nullptr;
  Fiber* arrived_from_ = nullptr;
};

}  // namespace emulate

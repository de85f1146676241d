// emulate/fiber.cpp   the switch itself: hand-written for x86-64 and AArch64, ucontext elsewhere
#include "fiber.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATE_ASAN 1
#endif

#if defined(__x86_64__) || defined(__aarch64__)
extern "C" void octet_fiber_switch(void** save_stack_pointer, void* load_stack_pointer);
#else
#include <ucontext.h>
#endif

#if defined(__x86_64__)
// The callee-saved registers of the System V ABI travel on the stack that is left.
asm(R"(
.text
.globl octet_fiber_switch
.hidden octet_fiber_switch
.type octet_fiber_switch, @function
octet_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size octet_fiber_switch, .-octet_fiber_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl octet_fiber_switch
.hidden octet_fiber_switch
.type octet_fiber_switch, %function
octet_fiber_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size octet_fiber_switch, .-octet_fiber_switch
)");
#endif

namespace emulate {
namespace {

// AddressSanitizer gives every frame red zones, so its frames are several times larger.
#if defined(EMULATE_ASAN)
constexpr std::size_t kStackBytes = 512 * 1024;
#else
constexpr std::size_t kStackBytes = 128 * 1024;
#endif

// A fresh fiber has no caller to hand it an argument, so the argument waits here for one switch.
thread_local void (*first_entry)(void*) = nullptr;
thread_local void* first_argument = nullptr;

[[noreturn]] void start() {
  first_entry(first_argument);
  std::abort();  // an entry that returns has no frame to return to
}

struct Start {
  void (*entry)(void*);
  void* argument;
};

}  // namespace

Fiber::~Fiber() {
  if (owns_stack_) munmap(stack_, size_);
#if !defined(__x86_64__) && !defined(__aarch64__)
  delete static_cast<ucontext_t*>(context_);
#endif
}

void Fiber::reset(void (*entry)(void*), void* argument) {
  if (!owns_stack_) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(memory);
    size_ = kStackBytes;
    owns_stack_ = true;
  }
#if defined(EMULATE_ASAN)
  __asan_unpoison_memory_region(stack_, size_);
  sanitizer_stack_ = nullptr;
#endif
  // The entry and its argument are kept at the top of the stack until the first switch picks them up.
  auto* top = reinterpret_cast<Start*>(stack_ + size_) - 1;
  *top = {entry, argument};
#if defined(__x86_64__)
  // Six registers, then the return address; after the `ret` the stack is 8 off a multiple of 16, as at any
  // function's first instruction.
  auto* frame =
      reinterpret_cast<std::uint64_t*>(reinterpret_cast<std::uintptr_t>(top) & ~std::uintptr_t{63}) - 8;
  for (int i = 0; i < 8; ++i) frame[i] = 0;
  frame[6] = reinterpret_cast<std::uint64_t>(&start);
  stack_pointer_ = frame;
#elif defined(__aarch64__)
  auto* frame =
      reinterpret_cast<std::uint64_t*>(reinterpret_cast<std::uintptr_t>(top) & ~std::uintptr_t{63}) - 20;
  for (int i = 0; i < 20; ++i) frame[i] = 0;
  frame[11] = reinterpret_cast<std::uint64_t>(&start);
  stack_pointer_ = frame;
#else
  if (context_ == nullptr) context_ = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(context_);
  getcontext(context);
  context->uc_stack.ss_sp = stack_;
  context->uc_stack.ss_size = size_ - 4096;
  context->uc_link = nullptr;
  makecontext(context, &start, 0);
#endif
}

void Fiber::switch_from(Fiber& from, [[maybe_unused]] bool from_is_done) {
  if (owns_stack_) {
    const auto* top = reinterpret_cast<const Start*>(stack_ + size_) - 1;
    first_entry = top->entry;
    first_argument = top->argument;
  }
  arrived_from_ = &from;
#if defined(EMULATE_ASAN)
  __sanitizer_start_switch_fiber(from_is_done ? nullptr : &from.sanitizer_stack_, stack_, size_);
#endif
#if defined(__x86_64__) || defined(__aarch64__)
  octet_fiber_switch(&from.stack_pointer_, stack_pointer_);
#else
  if (from.context_ == nullptr) from.context_ = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.context_), static_cast<ucontext_t*>(context_));
#endif
  from.arrived();
}

void Fiber::arrived() {
#if defined(EMULATE_ASAN)
  // What the sanitizer hands back is the stack we came from: this is how an OS thread's own is learnt.
  const void* bottom = nullptr;
  std::size_t size = 0;
  __sanitizer_finish_switch_fiber(sanitizer_stack_, &bottom, &size);
  if (arrived_from_ != nullptr && !arrived_from_->owns_stack_) {
    arrived_from_->stack_ = static_cast<char*>(const_cast<void*>(bottom));
    arrived_from_->size_ = size;
  }
#endif
}

}  // namespace emulate

// emulate/hooks.cpp   Every load and store of a kernel passes here
//
// Kernels are compiled with -fsanitize=thread but not linked to that sanitizer: the compiler then calls
// __tsan_read4(address) and its kin before each access, and the functions below answer. So the emulator
// sees the accesses of the ordinary .cu source: shared memory goes to SharedMemory's books, global memory
// must lie in a registered buffer, the thread's own stack and the library's constants are free.
// Calls from the host part of a .cu file find no running thread and pass.
#include <link.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "device.hpp"
#include "memory.hpp"

namespace emulate {
namespace {

struct Range {
  const char* begin;
  const char* end;
};

// One list per OS thread that launches; the threads that run its blocks see it through `buffers`.
thread_local std::vector<Range> own_buffers;

bool holds(const Range& range, const char* address, std::size_t size) {
  return address >= range.begin && address + size <= range.end;
}

// The loaded segments of this very library: constants, tables.
const std::vector<Range>& own_segments() {
  static const std::vector<Range> segments = [] {
    std::vector<Range> found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* out) {
          auto& list = *static_cast<std::vector<Range>*>(out);
          std::vector<Range> ranges;
          bool is_ours = false;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
            const char* begin = reinterpret_cast<const char*>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
            ranges.push_back({begin, begin + info->dlpi_phdr[i].p_memsz});
            is_ours |= holds(ranges.back(), reinterpret_cast<const char*>(&own_segments), 1);
          }
          if (is_ours) list = ranges;
          return int(is_ours);
        },
        &found);
    return found;
  }();
  return segments;
}

thread_local const std::vector<Range>* buffers = &own_buffers;

bool is_own_constant(const char* address, std::size_t size) {
  const auto& segments = own_segments();
  return std::any_of(segments.begin(), segments.end(),
                     [&](const Range& r) { return holds(r, address, size); });
}

// The size of the buffer whose edge is nearest to `address`, and how far from its begin that is.
std::string nearest_buffer(const char* address) {
  const auto distance = [&](const Range& r) { return std::max(r.begin - address, address - r.end); };
  const Range& nearest =
      *std::min_element(buffers->begin(), buffers->end(),
                        [&](const Range& a, const Range& b) { return distance(a) < distance(b); });
  return std::to_string(nearest.end - nearest.begin) + " bytes and the access at " +
         std::to_string(address - nearest.begin);
}

void check(const void* address, std::size_t size, bool is_write, const void* instruction = nullptr) {
  Thread* self = running();
  if (self == nullptr) return;
  const char* place = static_cast<const char*>(address);
  if (place >= self->fiber.stack_begin() && place < self->fiber.stack_end()) return;
  Block& block = *self->block;
  if (instruction) block.note(*self, instruction, address, size);
  if (block.shared().contains(address)) {
    block.check_shared(*self, is_write ? &SharedMemory::write : &SharedMemory::read, address, size);
    return;
  }
  const Body& body = block.body();
  const char* arguments = static_cast<const char*>(body.arguments);
  if (holds({arguments, arguments + body.size}, place, size)) return;
  if (may_touch(address, size) || (!is_write && is_own_constant(place, size))) return;
  block.fail(*self, std::string(is_write ? "writes " : "reads ") + std::to_string(size) +
                        " bytes outside of every buffer; the nearest is of " + nearest_buffer(place));
}

}  // namespace

void forget_buffers() {
  own_buffers.clear();
}

void register_buffer(const void* begin, std::size_t size) {
  const char* first = static_cast<const char*>(begin);
  own_buffers.push_back({first, first + size});
}

bool may_touch(const void* address, std::size_t size) {
  if (buffers->empty()) return true;
  const char* place = static_cast<const char*>(address);
  return std::any_of(buffers->begin(), buffers->end(), [&](const Range& r) { return holds(r, place, size); });
}

void check_atomic(const void* address, std::size_t size) {
  Thread* self = running();
  if (!self->block->shared().contains(address)) {
    check(address, size, true);
  } else {
    self->block->check_shared(*self, &SharedMemory::atomic, address, size);
  }
}

void check_global_read(const void* address, std::size_t size) {
  if (size) check(address, size, false);
}

const void* share_buffers() {
  return buffers;
}
void adopt_buffers(const void* shared) {
  buffers = static_cast<const std::vector<Range>*>(shared);
}

}  // namespace emulate

#define HOOK(name, size, is_write)                                        \
  extern "C" void name(void* address) {                                   \
    emulate::check(address, size, is_write, __builtin_return_address(0)); \
  }
#define HOOKS_OF_SIZE(size)                     \
  HOOK(__tsan_read##size, size, false)          \
  HOOK(__tsan_write##size, size, true)          \
  HOOK(__tsan_volatile_read##size, size, false) \
  HOOK(__tsan_volatile_write##size, size, true)
HOOKS_OF_SIZE(1)
HOOKS_OF_SIZE(2)
HOOKS_OF_SIZE(4)
HOOKS_OF_SIZE(8)
HOOKS_OF_SIZE(16)
#define UNALIGNED_HOOKS_OF_SIZE(size)            \
  HOOK(__tsan_unaligned_read##size, size, false) \
  HOOK(__tsan_unaligned_write##size, size, true)
UNALIGNED_HOOKS_OF_SIZE(2)
UNALIGNED_HOOKS_OF_SIZE(4)
UNALIGNED_HOOKS_OF_SIZE(8)
UNALIGNED_HOOKS_OF_SIZE(16)
extern "C" void __tsan_read_range(void* address, unsigned long size) {
  emulate::check(address, size, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, unsigned long size) {
  emulate::check(address, size, true, __builtin_return_address(0));
}
extern "C" void __tsan_vptr_update(void*, void*) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
